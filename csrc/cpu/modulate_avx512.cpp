// AVX-512 F, BW, VL, DQ.
#define MMFAST_VECTOR_BYTES 64
#include "modulate_kernels.h"

namespace mmfast {

const ModulateTable modulate_avx512 = modulate_table();

}  // namespace mmfast
