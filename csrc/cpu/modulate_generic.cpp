// Any processor with 16-byte vectors (x86-64 SSE, aarch64 NEON): compiled for the baseline.
#define MMFAST_VECTOR_BYTES 16
#include "modulate_kernels.h"

namespace mmfast {

const ModulateTable modulate_generic = modulate_table();

}  // namespace mmfast
