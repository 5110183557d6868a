#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<bf16, 64, false>;
template struct BackwardPasses<bf16, 64, true>;

}  // namespace mmfast
