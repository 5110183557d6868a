#include "cross_attention_pairs.cuh"

namespace mmfast {
template void launch_pairs<bf16>(const PairSums&, const Stream&);
}
