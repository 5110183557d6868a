// The launchers of adaptation_gate for one storage: which instance, how many blocks.
#pragma once
#include "adaptation_gate_bwd.cuh"
#include "adaptation_gate_fwd.cuh"
#include "launch.cuh"

namespace mmfast {

template <class T, int VEC>
void launch_adaptation_gate_fwd_as(const AdaptationGateFwdPlan& plan, const Stream& stream) {
  const int64_t block_rows = int64_t(plan.steps) * plan.teams.count;
  launch<adaptation_gate_fwd_kernel<T, VEC>>(
      {(plan.shape.rows() + block_rows - 1) / block_rows, 1, 1}, plan.teams.threads,
      shared_bytes<float>(kTeamScratch<4>), stream, plan);
}

template <class T, int VEC>
void launch_adaptation_gate_bwd_as(const AdaptationGateBwdPlan& plan, const Stream& stream) {
  const int64_t scratch = shared_bytes<float>(kTeamScratch<4>);
  if (plan.stats != nullptr)
    launch<adaptation_gate_stats_kernel<T, VEC>>({plan.shape.rows(), 1, 1}, plan.teams.threads,
                                                 scratch, stream, plan);
  const int64_t sums = plan.sums * int64_t(kAdaptationHeldBwd) * plan.teams.threads;
  launch<adaptation_gate_bwd_kernel<T, VEC>>({plan.chunks * plan.teams.tiles, 1, 1},
                                             plan.teams.threads,
                                             scratch + shared_bytes<float>(sums), stream, plan);
}

template <class T>
void launch_adaptation_gate_fwd(const AdaptationGateFwdPlan& plan, bool wide,
                                const Stream& stream) {
  if (wide)
    launch_adaptation_gate_fwd_as<T, 16 / int(sizeof(T))>(plan, stream);
  else
    launch_adaptation_gate_fwd_as<T, 1>(plan, stream);
}

template <class T>
void launch_adaptation_gate_bwd(const AdaptationGateBwdPlan& plan, bool wide,
                                const Stream& stream) {
  if (wide)
    launch_adaptation_gate_bwd_as<T, 16 / int(sizeof(T))>(plan, stream);
  else
    launch_adaptation_gate_bwd_as<T, 1>(plan, stream);
}

}  // namespace mmfast
