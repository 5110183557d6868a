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

// The member of a table with one for each storage dtype.
template <class Table>
const auto& for_storage(const Table& table, DType dtype) {
  switch (dtype) {
    case DType::F32:
      return table.f32;
    case DType::BF16:
      return table.bf16;
    case DType::F16:
      return table.f16;
    case DType::F64:
      break;
  }
  return table.f64;
}

// The kernels of an op with such tables. bf16 has some of its own, op##_avx512_bf16, where the
// processor rounds to it.
#if defined(__x86_64__)
#define MMFAST_KERNELS(op, dtype)                                                            \
  ((dtype) == ::mmfast::DType::BF16 && ::mmfast::isa_current() >= ::mmfast::Isa::AVX512_BF16 \
       ? op##_avx512_bf16                                                                    \
       : ::mmfast::for_storage(MMFAST_TABLE(op), dtype))
#else
#define MMFAST_KERNELS(op, dtype) (::mmfast::for_storage(MMFAST_TABLE(op), dtype))
#endif

}  // namespace mmfast
