// AVX2 + FMA + F16C.
#define MMFAST_VECTOR_BYTES 32
#include "fuse_kernels.h"

namespace mmfast {

const FuseTable fuse_avx2 = fuse_table();

}  // namespace mmfast
