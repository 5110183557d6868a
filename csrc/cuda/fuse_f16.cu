#include "fuse_bwd.cuh"

namespace mmfast {
const FuseCuda fuse_cuda_f16 = fuse_cuda<f16>();
}  // namespace mmfast
