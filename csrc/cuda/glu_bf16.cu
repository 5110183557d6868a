#include "glu.cuh"

namespace mmfast {
const GluCuda glu_cuda_bf16 = glu_cuda<bf16>();
}  // namespace mmfast
