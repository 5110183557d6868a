#include "cross_attention_pairs.cuh"

namespace mmfast {
template void launch_pairs<f16>(const PairSums&, const Stream&);
}
