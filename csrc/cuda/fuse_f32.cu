#include "fuse_bwd.cuh"

namespace mmfast {
const FuseCuda fuse_cuda_f32 = fuse_cuda<float>();
}  // namespace mmfast
