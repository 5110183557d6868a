#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<f16, 96, false>;

}  // namespace mmfast
