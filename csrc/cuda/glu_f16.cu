#include "glu.cuh"

namespace mmfast {
const GluCuda glu_cuda_f16 = glu_cuda<f16>();
}  // namespace mmfast
