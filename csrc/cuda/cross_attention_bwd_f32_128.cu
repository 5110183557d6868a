#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<float, 128, true>;

}  // namespace mmfast
