#include "modulate_launch.cuh"

namespace mmfast {

template void launch_modulate_fwd<float>(const ModulateFwdPlan&, bool, const Stream&);
template void launch_modulate_bwd<float>(const ModulateBwdPlan&, bool, const Stream&);

}  // namespace mmfast
