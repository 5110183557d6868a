#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<bf16, 128>;

}  // namespace mmfast
