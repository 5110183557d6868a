// Any processor with 16-byte vectors: compiled for the baseline.
#define MMFAST_VECTOR_BYTES 16
#include "gated_residual_kernels.h"

namespace mmfast {

extern const GatedResidualKernels gated_residual_generic;
const GatedResidualKernels gated_residual_generic = kGatedResidual;

}  // namespace mmfast
