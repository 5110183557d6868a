#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<bf16, 96, false>;

}  // namespace mmfast
