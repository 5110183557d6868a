// Any processor with 16-byte vectors: compiled for the baseline.
#define MMFAST_VECTOR_BYTES 16
#include "glu_kernels.h"

namespace mmfast {

extern const GluKernels glu_generic;
const GluKernels glu_generic = {glu_fwd, glu_bwd};

}  // namespace mmfast
