#include "glu.cuh"

namespace mmfast {
const GluCuda glu_cuda_f32 = glu_cuda<float>();
}  // namespace mmfast
