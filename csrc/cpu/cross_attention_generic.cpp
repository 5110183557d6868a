// Any processor with 16-byte vectors (x86-64 SSE, aarch64 NEON): compiled for the baseline.
#define MMFAST_VECTOR_BYTES 16
#if defined(__x86_64__)
#define MMFAST_TILE_ROWS 4  // sixteen vector registers
#define MMFAST_TILE_VECTORS 2
#endif
#include "isa_common.h"

#include "cross_attention_kernels.h"

namespace mmfast {

extern const CrossAttentionTable cross_attention_generic;
const CrossAttentionTable cross_attention_generic = {kernels_of<F32>(), kernels_of<F64>()};

}  // namespace mmfast
