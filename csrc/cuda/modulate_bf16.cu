#include "modulate_launch.cuh"

namespace mmfast {

template void launch_modulate_fwd<bf16>(const ModulateFwdPlan&, bool, const Stream&);
template void launch_modulate_bwd<bf16>(const ModulateBwdPlan&, bool, const Stream&);

}  // namespace mmfast
