// AVX-512 F, BW, VL, DQ.
#define MMFAST_VECTOR_BYTES 64
#include "glu_kernels.h"

namespace mmfast {

extern const GluKernels glu_avx512;
const GluKernels glu_avx512 = {glu_fwd, glu_bwd};

}  // namespace mmfast
