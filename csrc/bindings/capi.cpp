// The C entry points of the library: what Python asks through ctypes, without torch.
#include <string>

#include "../cpu/isa.h"

#define MMFAST_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string build_available() {
  std::string names;
  for (int i = 0; i < int(mmfast::Isa::COUNT); ++i) {
    if (!mmfast::isa_available(mmfast::Isa(i))) continue;
    if (!names.empty()) names += ",";
    names += mmfast::isa_name(mmfast::Isa(i));
  }
  return names;
}

std::string build_text() {
#if defined(__x86_64__)
  const char* compiled = "generic,avx2,avx512,avx512_bf16,amx";
#else
  const char* compiled = "generic";
#endif
#if defined(MMFAST_EMULATE_AMX)
  const char* emulated = "true";
#else
  const char* emulated = "false";
#endif
  return std::string("{\"version\": \"") + MMFAST_VERSION + "\", \"compiler\": \"" + __VERSION__ +
         "\", \"torch_target\": \"" + MMFAST_TORCH_TARGET + "\", \"isas\": \"" + compiled +
         "\", \"amx_emulated\": " + emulated + "}";
}

}  // namespace

MMFAST_EXPORT const char* mmfast_isa_available() {
  static const std::string names = build_available();
  return names.c_str();
}

MMFAST_EXPORT const char* mmfast_isa_current() { return mmfast::isa_name(mmfast::isa_current()); }

MMFAST_EXPORT int mmfast_isa_set(const char* name) { return mmfast::isa_set(name); }

MMFAST_EXPORT const char* mmfast_build_info() {
  static const std::string text = build_text();
  return text.c_str();
}
