// AVX-512 with BF16 conversions: bf16 storage only, the rest is modulate_avx512.cpp's.
#define MMFAST_VECTOR_BYTES 64
#include "modulate_kernels.h"

namespace mmfast {

const ModulateKernels modulate_avx512_bf16 = modulate_kernels<StoreBF16>();

}  // namespace mmfast
