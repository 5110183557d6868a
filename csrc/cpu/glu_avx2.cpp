// AVX2, FMA, F16C.
#define MMFAST_VECTOR_BYTES 32
#include "glu_kernels.h"

namespace mmfast {

extern const GluKernels glu_avx2;
const GluKernels glu_avx2 = {glu_fwd, glu_bwd};

}  // namespace mmfast
