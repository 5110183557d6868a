#include "cross_attention_fwd_launch.cuh"

namespace mmfast {

template void cross_attention_fwd_plain<bf16>(const FwdPlan&, const FwdArgs&, const Stream&);

}  // namespace mmfast
