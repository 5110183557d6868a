// AVX-512 with BF16 conversions: bf16 storage only, the rest is fuse_avx512.cpp's.
#define MMFAST_VECTOR_BYTES 64
#include "fuse_kernels.h"

namespace mmfast {

const FuseKernels fuse_avx512_bf16 = fuse_kernels<StoreBF16>();

}  // namespace mmfast
