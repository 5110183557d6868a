#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<float, 64, true>;

}  // namespace mmfast
