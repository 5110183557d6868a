// The plans of adaptation_gate: how rows are dealt to blocks, and where sums go.
#include "adaptation_gate_plan.h"
#include "column_sums.h"
#include "row_plans.h"

namespace mmfast {
namespace {

class Backward {
 public:
  AdaptationGateBwdPlan plan;

  Backward(const AdaptationGateBwdArgs& args, void* memory) : workspace_(memory) {
    AdaptationGateBwdPlan& p = plan;
    static_cast<AdaptationGateBwdArgs&>(p) = args;
    if (rows_first(p.shape, p.z))
      swap_rows(p.shape, {&p.z, &p.h, &p.dout, &p.row_mask, &p.dz, &p.dh});
    p.teams = row_teams(p.shape.columns, p.shape.rows(), kAdaptationHeldBwd, kBackwardThreads);
    p.chunk_rows = summed_rows(1, p.shape.rows(), p.teams, p.teams.tiles);
    p.chunks = (p.shape.rows() + p.chunk_rows - 1) / p.chunk_rows;
    sum_chunks();
    if (p.teams.tiles > 1)
      p.stats = reinterpret_cast<AdaptationStats*>(
          workspace_.take(p.shape.rows() * int64_t(sizeof(AdaptationStats) / sizeof(float))));
  }

  int64_t workspace_bytes() const { return workspace_.bytes(); }

  bool wide() const {
    const AdaptationGateBwdPlan& p = plan;
    return wide_rows(p.shape, p.z.dtype, {&p.z, &p.h, &p.dout, &p.weight, &p.dz, &p.dh});
  }

  // After the kernels: what blocks left becomes gradients.
  void second_stage(const Stream& stream) const {
    if (later_.slots > 0) column_sums(later_, stream);
  }

 private:
  // One chunk is the result; several leave partial sums.
  void sum_chunks() {
    AdaptationGateBwdPlan& p = plan;
    later_.chunks = later_.group = p.chunks;
    later_.columns = p.shape.columns;
    struct Sum {
      const RowOperand& gradient;
      RowOperand& of_chunks;
      int32_t& place;
    } sums[] = {{p.dweight, p.sum_weight, p.at_weight}, {p.dbias, p.sum_bias, p.at_bias}};
    for (Sum& sum : sums) {
      if (sum.gradient.data == nullptr) continue;
      sum.place = p.sums++;
      if (p.chunks == 1) {
        sum.of_chunks = sum.gradient;
        continue;
      }
      const int32_t slot = later_.slots++;
      later_.out[slot] = sum.gradient.data, later_.out_dtype[slot] = sum.gradient.dtype;
    }
    if (later_.slots == 0) return;
    const int64_t one = p.chunks * p.shape.columns;
    float* partials = workspace_.take(later_.slots * one);
    later_.partials = partials;
    for (Sum& sum : sums) {
      if (sum.place < 0) continue;
      sum.of_chunks = {partials + sum.place * one, p.shape.columns, 0, 1, DType::F32};
    }
  }

  Workspace workspace_;
  ColumnSumsArgs later_;
};

}  // namespace

void adaptation_gate_fwd(const AdaptationGateFwdArgs& args, const Stream& stream) {
  AdaptationGateFwdPlan p;
  static_cast<AdaptationGateFwdArgs&>(p) = args;
  if (rows_first(p.shape, p.z)) swap_rows(p.shape, {&p.z, &p.h, &p.row_mask, &p.out});
  p.teams = row_teams(p.shape.columns, p.shape.rows(), kAdaptationHeld, kForwardThreads);
  p.steps = team_steps(p.shape, p.teams);
  const bool wide = wide_rows(p.shape, p.z.dtype, {&p.z, &p.h, &p.weight, &p.bias, &p.out});
  with_storage(p.z.dtype, [&](auto storage) {
    launch_adaptation_gate_fwd<decltype(storage)>(p, wide, stream);
  });
}

int64_t adaptation_gate_bwd_workspace(const AdaptationGateBwdArgs& args) {
  return Backward(args, Workspace::nowhere()).workspace_bytes();
}

void adaptation_gate_bwd(const AdaptationGateBwdArgs& args, void* workspace, const Stream& stream) {
  const Backward backward(args, workspace);
  with_storage(args.z.dtype, [&](auto storage) {
    launch_adaptation_gate_bwd<decltype(storage)>(backward.plan, backward.wide(), stream);
  });
  backward.second_stage(stream);
}

}  // namespace mmfast
