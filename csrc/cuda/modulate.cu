// The plans of modulate: how rows are dealt to blocks, and what each gradient is summed over.
#include "column_sums.h"
#include "modulate_plan.h"
#include "row_plans.h"

namespace mmfast {
namespace {

enum class Over { NOTHING, ITEM_ROWS, ALL_ROWS, ITEMS };

// What the gradient of a side tensor is summed over.
Over summed_over(const RowOperand& gradient, const RowShape& shape) {
  const bool items = gradient.s0 != 0 || shape.n0 == 1, rows = gradient.s1 != 0 || shape.n1 == 1;
  if (items) return rows ? Over::NOTHING : Over::ITEM_ROWS;
  return rows ? Over::ITEMS : Over::ALL_ROWS;
}

class Backward {
 public:
  ModulateBwdPlan plan;

  Backward(const ModulateBwdArgs& args, void* workspace) : workspace_(workspace) {
    static_cast<ModulateBwdArgs&>(plan) = args;
    // Sums over the items alone: with items and rows exchanged they are sums over rows.
    bool by_item = any(Over::ITEM_ROWS);
    if (by_item ? false : any(Over::ITEMS) || rows_first(plan.shape, plan.x)) {
      exchange();
      by_item = any(Over::ITEM_ROWS);
    }
    cut(by_item ? plan.shape.n0 : 1);
    const RowOperand& scale = plan.scale;
    plan.scale_by_row =
        scale.data != nullptr && ((scale.s1 != 0 && plan.shape.n1 > 1) ||
                                  (scale.s0 != 0 && plan.shape.n0 > 1 && plan.groups == 1));
    sum_chunks();
    sum_terms();
    name_sums();
    if (plan.teams.tiles > 1 && plan.norm != RowNorm::NONE && plan.dout.data != nullptr)
      plan.stats = workspace_.take(plan.shape.rows() * kModulateStats);
  }

  int64_t workspace_bytes() const { return workspace_.bytes(); }

  bool wide() const {
    const ModulateBwdPlan& p = plan;
    return wide_rows(p.shape, p.x.dtype,
                     {&p.x, &p.h, &p.dout, &p.dh, &p.gate, &p.scale, &p.weight, &p.bias, &p.dx,
                      &p.dresidual, &p.dgate, &p.dscale, &p.dshift, &p.sum_gate, &p.sum_scale,
                      &p.sum_shift, &p.sum_weight, &p.sum_bias});
  }

  // After the kernels: what blocks left becomes gradients.
  void second_stage(const Stream& stream) const {
    for (const ColumnSumsArgs* sums : {&of_items_, &of_all_, &terms_[0], &terms_[1], &terms_[2]})
      if (sums->slots > 0) column_sums(*sums, stream);
  }

 private:
  bool any(Over over) const {
    for (const RowOperand* g : {&plan.dgate, &plan.dscale, &plan.dshift})
      if (g->data != nullptr && summed_over(*g, plan.shape) == over) return true;
    return false;
  }
  void exchange() {
    ModulateBwdPlan& p = plan;
    swap_rows(p.shape, {&p.x, &p.h, &p.dout, &p.dh, &p.gate, &p.scale, &p.dx, &p.dresidual,
                        &p.dgate, &p.dscale, &p.dshift});
  }

  void cut(int64_t groups) {
    plan.groups = groups;
    plan.group_rows = plan.shape.rows() / groups;
    plan.teams = row_teams(plan.shape.columns, plan.group_rows, kModulateHeldBwd, kBackwardThreads);
    plan.chunk_rows = summed_rows(groups, plan.group_rows, plan.teams, plan.teams.tiles);
    plan.chunks = (plan.group_rows + plan.chunk_rows - 1) / plan.chunk_rows;
  }

  // Sums over rows: one chunk for each result is the result; otherwise partial sums.
  void sum_chunks() {
    ModulateBwdPlan& p = plan;
    struct Sum {
      RowOperand& gradient;
      RowOperand& of_chunks;
      bool vector;
    } sums[] = {{p.dgate, p.sum_gate, false},
                {p.dscale, p.sum_scale, false},
                {p.dshift, p.sum_shift, false},
                {p.dweight, p.sum_weight, true},
                {p.dbias, p.sum_bias, true}};
    const int64_t all = p.groups * p.chunks;
    for (Over over : {Over::ITEM_ROWS, Over::ALL_ROWS}) {
      const bool items = over == Over::ITEM_ROWS;
      ColumnSumsArgs& later = items ? of_items_ : of_all_;
      later.chunks = all, later.columns = p.shape.columns;
      later.group = items ? p.chunks : all;
      const bool at_once = all == (items ? p.groups : 1);
      for (Sum& sum : sums) {
        RowOperand& g = sum.gradient;
        if (g.data == nullptr) continue;
        if ((sum.vector ? Over::ALL_ROWS : summed_over(g, p.shape)) != over) continue;
        if (at_once) {
          sum.of_chunks = g;
          continue;
        }
        const int32_t slot = later.slots++;
        later.out[slot] = g.data, later.out_dtype[slot] = g.dtype;
        later.out_stride[slot] = items ? g.s0 : 0;
      }
      if (later.slots == 0) continue;
      later.partials = workspace_.take(later.slots * all * p.shape.columns);
      for (int32_t slot = 0; slot < later.slots; ++slot)
        for (Sum& sum : sums)
          if (sum.gradient.data == later.out[slot])
            sum.of_chunks = partial(later.partials + slot * all * p.shape.columns);
    }
    for (Sum& sum : sums)
      if (sum.of_chunks.data != nullptr && !sum.vector) sum.gradient.data = nullptr;
  }
  RowOperand partial(const float* at) const {
    RowOperand x;
    x.data = const_cast<float*>(at);
    x.s0 = plan.shape.columns;
    x.dtype = DType::F32;
    return x;
  }

  void name_sums() {
    ModulateBwdPlan& p = plan;
    const auto need = [&](bool needed, int32_t& place) {
      if (needed) place = p.sums++;
    };
    const bool whole = !p.scale_by_row, scale = p.sum_scale.data != nullptr;
    const bool bias = p.sum_bias.data != nullptr;
    need(p.sum_gate.data != nullptr, p.at_gate);
    need(p.sum_shift.data != nullptr || (whole && bias) || (scale && p.bias.data != nullptr),
         p.at_dout);
    need(!whole && bias, p.at_d);
    need(scale || p.sum_weight.data != nullptr, p.at_d_n);
  }

  // Sums over items that cannot be had in the same pass as those over rows: every term is written.
  void sum_terms() {
    const RowShape& shape = plan.shape;
    int count = 0;
    for (RowOperand* g : {&plan.dgate, &plan.dscale, &plan.dshift}) {
      if (g->data == nullptr || summed_over(*g, shape) != Over::ITEMS) continue;
      ColumnSumsArgs& later = terms_[count++];
      later.chunks = later.group = shape.n0;
      later.columns = shape.n1 * shape.columns;
      later.slots = 1;
      later.out[0] = g->data, later.out_dtype[0] = g->dtype;
      float* all = workspace_.take(shape.elements());
      later.partials = all;
      *g = {all, later.columns, shape.columns, 1, DType::F32};
    }
  }

  Workspace workspace_;
  ColumnSumsArgs of_items_, of_all_, terms_[3];
};

}  // namespace

void modulate_fwd(const ModulateFwdArgs& args, const Stream& stream) {
  ModulateFwdPlan p;
  static_cast<ModulateFwdArgs&>(p) = args;
  if (rows_first(p.shape, p.x))
    swap_rows(p.shape, {&p.x, &p.residual, &p.gate, &p.scale, &p.shift, &p.out, &p.h});
  p.teams = row_teams(p.shape.columns, p.shape.rows(), kModulateHeld, kForwardThreads);
  p.steps = team_steps(p.shape, p.teams);
  const bool wide =
      wide_rows(p.shape, p.x.dtype,
                {&p.x, &p.residual, &p.gate, &p.scale, &p.shift, &p.weight, &p.bias, &p.out, &p.h});
  with_storage(p.x.dtype,
               [&](auto storage) { launch_modulate_fwd<decltype(storage)>(p, wide, stream); });
}

int64_t modulate_bwd_workspace(const ModulateBwdArgs& args) {
  return Backward(args, Workspace::nowhere()).workspace_bytes();
}

void modulate_bwd(const ModulateBwdArgs& args, void* workspace, const Stream& stream) {
  const Backward backward(args, workspace);
  with_storage(args.x.dtype, [&](auto storage) {
    launch_modulate_bwd<decltype(storage)>(backward.plan, backward.wide(), stream);
  });
  backward.second_stage(stream);
}

}  // namespace mmfast
