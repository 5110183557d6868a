// AVX2, FMA, F16C.
#define MMFAST_VECTOR_BYTES 32
#include "adaptation_gate_kernels.h"

namespace mmfast {

const AdaptationGateTable adaptation_gate_avx2 = adaptation_gate_table();

}  // namespace mmfast
