#include "fuse_bwd.cuh"

namespace mmfast {
const FuseCuda fuse_cuda_bf16 = fuse_cuda<bf16>();
}  // namespace mmfast
