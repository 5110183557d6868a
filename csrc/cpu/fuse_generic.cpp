// Any processor with 16-byte vectors (x86-64 SSE, aarch64 NEON): compiled for the baseline.
#define MMFAST_VECTOR_BYTES 16
#include "fuse_kernels.h"

namespace mmfast {

const FuseTable fuse_generic = fuse_table();

}  // namespace mmfast
