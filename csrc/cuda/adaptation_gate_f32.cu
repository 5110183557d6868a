#include "adaptation_gate_launch.cuh"

namespace mmfast {

template void launch_adaptation_gate_fwd<float>(const AdaptationGateFwdPlan&, bool, const Stream&);
template void launch_adaptation_gate_bwd<float>(const AdaptationGateBwdPlan&, bool, const Stream&);

}  // namespace mmfast
