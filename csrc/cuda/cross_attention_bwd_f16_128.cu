#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<f16, 128, false>;
template struct BackwardPasses<f16, 128, true>;

}  // namespace mmfast
