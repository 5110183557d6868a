// The AMX kernels with the tile operations written out in C++, for tests on machines without AMX.
#define MMFAST_VECTOR_BYTES 64
#define MMFAST_FWD_KEYS 288  // whole tiles of keys
#define MMFAST_FWD_STRIP 32
#define MMFAST_BWD_ROWS 64
#include "isa_common.h"

#include "gemm_amx.h"

#include "cross_attention_kernels.h"

namespace mmfast {

extern const CrossAttentionTable cross_attention_amx_emulated;
const CrossAttentionTable cross_attention_amx_emulated = {kernels_of<AMX>(), {}};

}  // namespace mmfast
