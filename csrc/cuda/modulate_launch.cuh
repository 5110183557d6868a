// The launchers of modulate for one storage: which instance, how many blocks.
#pragma once
#include "launch.cuh"
#include "modulate_bwd.cuh"
#include "modulate_fwd.cuh"

namespace mmfast {

template <class T, int VEC>
void launch_modulate_fwd_as(const ModulateFwdPlan& plan, const Stream& stream) {
  const int64_t block_rows = int64_t(plan.steps) * plan.teams.count;
  launch<modulate_fwd_kernel<T, VEC>>({(plan.shape.rows() + block_rows - 1) / block_rows, 1, 1},
                                      plan.teams.threads, shared_bytes<float>(kTeamScratch<2>),
                                      stream, plan);
}

template <class T, int VEC>
void launch_modulate_bwd_as(const ModulateBwdPlan& plan, const Stream& stream) {
  const int64_t scratch = shared_bytes<float>(kTeamScratch<2>);
  if (plan.stats != nullptr)
    launch<modulate_stats_kernel<T, VEC>>({plan.shape.rows(), 1, 1}, plan.teams.threads, scratch,
                                          stream, plan);
  launch<modulate_bwd_kernel<T, VEC>>(
      {plan.groups * plan.chunks * plan.teams.tiles, 1, 1}, plan.teams.threads,
      scratch + shared_bytes<float>(plan.sums * int64_t(kModulateHeldBwd) * plan.teams.threads),
      stream, plan);
}

template <class T>
void launch_modulate_fwd(const ModulateFwdPlan& plan, bool wide, const Stream& stream) {
  if (wide)
    launch_modulate_fwd_as<T, 16 / int(sizeof(T))>(plan, stream);
  else
    launch_modulate_fwd_as<T, 1>(plan, stream);
}

template <class T>
void launch_modulate_bwd(const ModulateBwdPlan& plan, bool wide, const Stream& stream) {
  if (wide)
    launch_modulate_bwd_as<T, 16 / int(sizeof(T))>(plan, stream);
  else
    launch_modulate_bwd_as<T, 1>(plan, stream);
}

}  // namespace mmfast
