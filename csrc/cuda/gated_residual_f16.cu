#include "gated_residual.cuh"

namespace mmfast {
const GatedResidualCuda gated_residual_cuda_f16 = gated_residual_cuda<f16>();
}  // namespace mmfast
