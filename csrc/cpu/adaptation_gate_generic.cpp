// Any processor with 16-byte vectors (x86-64 SSE, aarch64 NEON): compiled for the baseline.
#define MMFAST_VECTOR_BYTES 16
#include "adaptation_gate_kernels.h"

namespace mmfast {

const AdaptationGateTable adaptation_gate_generic = adaptation_gate_table();

}  // namespace mmfast
