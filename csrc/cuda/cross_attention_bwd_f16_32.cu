#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<f16, 32, false>;

}  // namespace mmfast
