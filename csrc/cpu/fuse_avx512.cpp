// AVX-512 F, BW, VL, DQ.
#define MMFAST_VECTOR_BYTES 64
#include "fuse_kernels.h"

namespace mmfast {

const FuseTable fuse_avx512 = fuse_table();

}  // namespace mmfast
