#include "cross_attention_pairs.cuh"

namespace mmfast {
template void launch_pairs<float>(const PairSums&, const Stream&);
}
