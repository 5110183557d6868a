// AVX-512 with bf16 dot products: bf16 storage multiplies in bf16 and sums in float.
#define MMFAST_VECTOR_BYTES 64
// Half the bytes a value: longer blocks of keys and shorter strips were 1.1 times as fast on Zen 4.
#define MMFAST_FWD_KEYS 272
#define MMFAST_FWD_STRIP 24
#include "isa_common.h"

#include "cross_attention_kernels.h"

namespace mmfast {

extern const CrossAttentionTable cross_attention_avx512_bf16;
// Float and double gain nothing here: the selection takes those from the plain AVX-512 table.
const CrossAttentionTable cross_attention_avx512_bf16 = {kernels_of<BF16>(), {}};

}  // namespace mmfast
