#include "gated_residual.cuh"

namespace mmfast {
const GatedResidualCuda gated_residual_cuda_f32 = gated_residual_cuda<float>();
}  // namespace mmfast
