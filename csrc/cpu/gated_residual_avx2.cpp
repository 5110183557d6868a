// AVX2, FMA, F16C.
#define MMFAST_VECTOR_BYTES 32
#include "gated_residual_kernels.h"

namespace mmfast {

extern const GatedResidualKernels gated_residual_avx2;
const GatedResidualKernels gated_residual_avx2 = kGatedResidual;

}  // namespace mmfast
