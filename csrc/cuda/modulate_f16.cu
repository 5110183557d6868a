#include "modulate_launch.cuh"

namespace mmfast {

template void launch_modulate_fwd<f16>(const ModulateFwdPlan&, bool, const Stream&);
template void launch_modulate_bwd<f16>(const ModulateBwdPlan&, bool, const Stream&);

}  // namespace mmfast
