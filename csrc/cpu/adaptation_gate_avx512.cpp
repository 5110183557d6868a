// AVX-512 F, BW, VL, DQ.
#define MMFAST_VECTOR_BYTES 64
#include "adaptation_gate_kernels.h"

namespace mmfast {

const AdaptationGateTable adaptation_gate_avx512 = adaptation_gate_table();

}  // namespace mmfast
