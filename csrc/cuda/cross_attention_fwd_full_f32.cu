#include "cross_attention_fwd_launch.cuh"

namespace mmfast {

template void cross_attention_fwd_full<float>(const FwdPlan&, const FwdArgs&, const Stream&);

}  // namespace mmfast
