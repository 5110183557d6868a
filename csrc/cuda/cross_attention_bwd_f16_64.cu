#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<f16, 64, false>;
template struct BackwardPasses<f16, 64, true>;

}  // namespace mmfast
