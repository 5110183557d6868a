// AVX2, FMA, F16C.
#define MMFAST_VECTOR_BYTES 32
#include "modulate_kernels.h"

namespace mmfast {

const ModulateTable modulate_avx2 = modulate_table();

}  // namespace mmfast
