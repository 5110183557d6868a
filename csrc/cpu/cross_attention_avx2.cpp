// AVX2 + FMA + F16C.
#define MMFAST_VECTOR_BYTES 32
#define MMFAST_TILE_VECTORS 2  // sixteen vector registers
#include "isa_common.h"

#include "cross_attention_kernels.h"

namespace mmfast {

extern const CrossAttentionTable cross_attention_avx2;
const CrossAttentionTable cross_attention_avx2 = {kernels_of<F32>(), kernels_of<F64>()};

}  // namespace mmfast
