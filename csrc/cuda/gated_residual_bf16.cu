#include "gated_residual.cuh"

namespace mmfast {
const GatedResidualCuda gated_residual_cuda_bf16 = gated_residual_cuda<bf16>();
}  // namespace mmfast
