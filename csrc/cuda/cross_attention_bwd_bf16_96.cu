#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<bf16, 96>;

}  // namespace mmfast
