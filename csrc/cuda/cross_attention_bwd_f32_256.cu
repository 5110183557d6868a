#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<float, 256, true>;

}  // namespace mmfast
