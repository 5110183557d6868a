// Which instruction set the CPU kernels use: detected once, capped by MMFAST_ISA, switchable.
#pragma once
#include "cross_attention.h"

namespace mmfast {

enum class Isa : int { GENERIC = 0, AVX2, AVX512, AVX512_BF16, AMX, COUNT };

const char* isa_name(Isa isa);
bool isa_available(Isa isa);  // compiled in, and this processor and kernel can run it
Isa isa_current();
// 0 done, 1 no such name, 2 not available here. Null or "auto" is the best available.
int isa_set(const char* name);

// The passes for a storage dtype under the current instruction set.
const CrossAttentionKernels& cross_attention_kernels(DType dtype);

// Bytes of the last-level cache that threads share, as the system tells.
int64_t last_level_cache_bytes();

// The table of an op whose kernels come in three builds: op##_generic, op##_avx2, op##_avx512.
#if defined(__x86_64__)
#define MMFAST_TABLE(op)                                          \
  (::mmfast::isa_current() >= ::mmfast::Isa::AVX512 ? op##_avx512 \
   : ::mmfast::isa_current() == ::mmfast::Isa::AVX2 ? op##_avx2   \
                                                    : op##_generic)
#else
#define MMFAST_TABLE(op) (op##_generic)
#endif

}  // namespace mmfast
