#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<bf16, 256, true>;

}  // namespace mmfast
