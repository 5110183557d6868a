// Which instruction set the CPU kernels use: detected once, capped by MMFAST_ISA, switchable.
#pragma once
#include "cross_attention.h"

namespace mmfast {

enum class Isa : int { GENERIC = 0, AVX2, AVX512, AVX512_BF16, AMX, COUNT };

const char* isa_name(Isa isa);
bool isa_available(Isa isa);  // compiled in, and this processor and kernel can run it
Isa isa_current();
// 0 done, 1 no such name, 2 not available here. Null or "auto" is the best available.
int isa_set(const char* name);

// The passes for a storage dtype under the current instruction set.
const CrossAttentionKernels& cross_attention_kernels(DType dtype);

}  // namespace mmfast
