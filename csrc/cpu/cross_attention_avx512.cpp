// AVX-512 F, BW, VL, DQ.
#define MMFAST_VECTOR_BYTES 64
#include "isa_common.h"

#include "cross_attention_kernels.h"

namespace mmfast {

extern const CrossAttentionTable cross_attention_avx512;
const CrossAttentionTable cross_attention_avx512 = {kernels_of<F32>(), kernels_of<F64>()};

}  // namespace mmfast
