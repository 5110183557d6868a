#include "cross_attention_bwd.cuh"

namespace mmfast {

template struct BackwardPasses<f16, 256, true>;

}  // namespace mmfast
