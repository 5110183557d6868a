// AVX-512 F, BW, VL, DQ.
#define MMFAST_VECTOR_BYTES 64
#include "gated_residual_kernels.h"

namespace mmfast {

extern const GatedResidualKernels gated_residual_avx512;
const GatedResidualKernels gated_residual_avx512 = kGatedResidual;

}  // namespace mmfast
