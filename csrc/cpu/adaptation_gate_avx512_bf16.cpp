// AVX-512 with BF16 conversions: bf16 storage only, the rest is adaptation_gate_avx512.cpp's.
#define MMFAST_VECTOR_BYTES 64
#include "adaptation_gate_kernels.h"

namespace mmfast {

const AdaptationGateKernels adaptation_gate_avx512_bf16 = adaptation_gate_kernels<StoreBF16>();

}  // namespace mmfast
