#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<bf16, 128, false>;
template struct BackwardPasses<bf16, 128, true>;

}  // namespace mmfast
