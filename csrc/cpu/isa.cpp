#include "isa.h"

#include <stdio.h>
#include <string.h>

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mmfast {

extern const CrossAttentionTable cross_attention_generic;
#if defined(__x86_64__)
extern const CrossAttentionTable cross_attention_avx2;
extern const CrossAttentionTable cross_attention_avx512;
extern const CrossAttentionTable cross_attention_avx512_bf16;
extern const CrossAttentionTable cross_attention_amx;
#if defined(MMFAST_EMULATE_AMX)
extern const CrossAttentionTable cross_attention_amx_emulated;
#endif
#endif

namespace {

struct Features {
  bool has[int(Isa::COUNT)] = {true, false, false, false, false};
  bool amx_emulated = false;
};

#if defined(__x86_64__)
uint64_t enabled_register_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

Features detect() {
  Features f;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const uint64_t state = enabled_register_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
  const bool tiles = (state & 0x60000) == 0x60000;
  const bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
  const bool amx = (d >> 24 & 1) && (d >> 22 & 1);
  bool avx512_bf16 = false;
  if (a >= 1) {
    unsigned a1 = 0, b1 = 0, c1 = 0, d1 = 0;
    __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
    avx512_bf16 = a1 >> 5 & 1;
  }
  f.has[int(Isa::AVX2)] = avx && ymm && fma && f16c && (b >> 5 & 1);
  f.has[int(Isa::AVX512)] = f.has[int(Isa::AVX2)] && zmm && avx512;
  f.has[int(Isa::AVX512_BF16)] = f.has[int(Isa::AVX512)] && avx512_bf16;
  if (f.has[int(Isa::AVX512_BF16)] && amx && tiles) {
    // Linux hands the tile registers out on request only (arch_prctl ARCH_REQ_XCOMP_PERM).
    f.has[int(Isa::AMX)] = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }
#if defined(MMFAST_EMULATE_AMX)
  if (f.has[int(Isa::AVX512_BF16)] && !f.has[int(Isa::AMX)]) {
    f.has[int(Isa::AMX)] = f.amx_emulated = true;
  }
#endif
  return f;
}
#else
Features detect() { return Features{}; }
#endif

const Features& features() {
  static const Features f = detect();
  return f;
}

Isa best() {
  int i = int(Isa::COUNT) - 1;
  if (features().amx_emulated) --i;  // for tests only: never chosen by itself
  while (!features().has[i]) --i;
  return Isa(i);
}

std::atomic<int> current{-1};

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};
  return names[int(isa)];
}

bool isa_available(Isa isa) { return features().has[int(isa)]; }

Isa isa_current() {
  int i = current.load(std::memory_order_relaxed);
  if (i < 0) {
    i = int(best());
    current.store(i, std::memory_order_relaxed);
  }
  return Isa(i);
}

int isa_set(const char* name) {
  if (name == nullptr || strcmp(name, "auto") == 0) {
    current.store(int(best()), std::memory_order_relaxed);
    return 0;
  }
  for (int i = 0; i < int(Isa::COUNT); ++i) {
    if (strcmp(name, isa_name(Isa(i))) != 0) continue;
    if (!isa_available(Isa(i))) return 2;
    current.store(i, std::memory_order_relaxed);
    return 0;
  }
  return 1;
}

int64_t last_level_cache_bytes() {
  // Not sysconf: on AMD processors it counts the caches of the whole package, of which a thread can
  // use one (a Zen 4 guest: 320 MiB for 32).
  static const int64_t bytes = [] {
    int64_t largest = 0;
    for (char index = '0'; index <= '4'; ++index) {
      char path[] = "/sys/devices/system/cpu/cpu0/cache/index?/size";
      *strchr(path, '?') = index;
      FILE* file = fopen(path, "r");
      if (file == nullptr) continue;
      long long size = 0;
      char unit = ' ';
      if (fscanf(file, "%lld%c", &size, &unit) >= 1) {
        const int64_t unit_bytes = unit == 'K' ? 1 << 10 : unit == 'M' ? 1 << 20 : 1;
        if (size * unit_bytes > largest) largest = size * unit_bytes;
      }
      fclose(file);
    }
    return largest > 0 ? largest : int64_t(32) << 20;
  }();
  return bytes;
}

const CrossAttentionKernels& cross_attention_kernels(DType dtype) {
  const Isa isa = isa_current();
#if defined(__x86_64__)
  if (dtype == DType::BF16 && isa >= Isa::AVX512_BF16) {
    if (isa == Isa::AVX512_BF16) return cross_attention_avx512_bf16.f32;
#if defined(MMFAST_EMULATE_AMX)
    if (features().amx_emulated) return cross_attention_amx_emulated.f32;
#endif
    return cross_attention_amx.f32;
  }
  if (isa >= Isa::AVX2) {
    const CrossAttentionTable& table =
        isa == Isa::AVX2 ? cross_attention_avx2 : cross_attention_avx512;
    return dtype == DType::F64 ? table.f64 : table.f32;
  }
#endif
  (void)isa;
  return dtype == DType::F64 ? cross_attention_generic.f64 : cross_attention_generic.f32;
}

}  // namespace mmfast
