// The C entry points of the library: what Python asks through ctypes, without torch.
#include <string>

#include "../cpu/isa.h"

#define MMFAST_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(MMFAST_CUDA)
// Weak: a CPU build of torch has none.
extern "C" __attribute__((weak)) int aoti_torch_get_current_cuda_stream(int, void**);
#endif

// What the build put in, as text; a build without CUDA gives none of them.
#if !defined(MMFAST_CUDA_ARCHS)
#define MMFAST_CUDA_ARCHS ""
#endif
#if !defined(MMFAST_CUDA_PTX)
#define MMFAST_CUDA_PTX ""
#endif
#if !defined(MMFAST_CUDA_VERSION)
#define MMFAST_CUDA_VERSION ""
#endif

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
         "\", \"amx_emulated\": " + emulated + ", \"cuda_version\": \"" + MMFAST_CUDA_VERSION +
         "\", \"cuda_archs\": \"" + MMFAST_CUDA_ARCHS + "\", \"cuda_ptx\": \"" + MMFAST_CUDA_PTX +
         "\"}";
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

// Whether kernels can be launched with this torch: 1 where it has CUDA streams.
MMFAST_EXPORT int mmfast_cuda_streams() {
#if defined(MMFAST_CUDA)
  return aoti_torch_get_current_cuda_stream != nullptr;
#else
  return 0;
#endif
}
