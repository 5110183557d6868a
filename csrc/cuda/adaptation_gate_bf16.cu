#include "adaptation_gate_launch.cuh"

namespace mmfast {

template void launch_adaptation_gate_fwd<bf16>(const AdaptationGateFwdPlan&, bool, const Stream&);
template void launch_adaptation_gate_bwd<bf16>(const AdaptationGateBwdPlan&, bool, const Stream&);

}  // namespace mmfast
