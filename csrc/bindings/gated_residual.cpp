// Registration of gated_residual's ops for CPU tensors. Shapes and dtypes are checked by the Python
// op; what is checked here again is only what would be unsafe.
#include "../cpu/gated_residual.h"

#include <algorithm>
#include <tuple>

#include "../cpu/isa.h"
#include "parallel.h"
#include "rows.h"
#include "schemas.h"

namespace mmfast {
namespace {

constexpr double kWorkPerElement = 8;

void require(bool condition, const char* what) { require_rows(condition, "gated_residual", what); }

RowOperand data(const Tensor& t, const GatedResidualArgs& a) {
  require(t.dim() == 3 && dtype_of(t) == a.dtype, "data must be [B, N, C] of one dtype");
  const RowShape s = row_shape(t);
  require(s.n0 == a.shape.n0 && s.n1 == a.shape.n1 && s.columns == a.shape.columns,
          "data must have one shape");
  require(s.columns <= 1 || t.numel() == 0 || t.strides()[2] == 1,
          "the last dim of data must be dense");
  return row_data(t);
}

// `gate` is replaced by a contiguous copy where its last dim is not dense, and in the backward
// where it was expanded: its gradient is not, and the two are read and written side by side.
GatedResidualArgs make_args(const Tensor& y, Tensor& gate, const OptionalTensor& row_mask,
                            int64_t activation, bool backward) {
  GatedResidualArgs a;
  require(y.dim() == 3, "data must be [B, N, C]");
  a.shape = row_shape(y);
  a.dtype = dtype_of(y);
  require(activation >= 0 && activation < kGateActivations, "no such activation");
  a.activation = int(activation);
  require(broadcasts_to(gate, a.shape, 3), "gate must be [B|1, N|1, C|1]");
  const auto expanded = [&](int64_t dim) {
    return gate.sizes()[dim] > 1 && gate.strides()[dim] == 0;
  };
  if ((gate.sizes()[2] > 1 && gate.strides()[2] != 1) || (backward && (expanded(0) || expanded(1))))
    gate = torch::stable::contiguous(gate);
  a.gate = row_side(gate);
  require(a.gate.dtype == a.dtype || a.gate.dtype == accumulate_dtype(a.dtype),
          "gate must have the dtype of the data or float32");
  if (row_mask.has_value()) {
    require(row_mask->scalar_type() == ScalarType::Bool && broadcasts_to(*row_mask, a.shape, 2),
            "row_mask must be bool [B|1, N|1]");
    a.mask = row_flags(*row_mask);
  }
  return a;
}

void run_rows(GatedResidualArgs& a, GatedResidualKernels::Run run) {
  a.tasks = row_tasks(a.shape);
  // Rows that share a row of the gate: enough of them a task for its activation to cost little.
  const bool shared = a.gate.sc != 0 && (a.shape.n1 > 1 ? a.gate.s1 == 0 : a.gate.s0 == 0);
  constexpr int64_t kSharingRows = 16;
  if (shared && a.tasks.rows_each < kSharingRows) {
    a.tasks.rows_each = kSharingRows;
    a.tasks.row_tasks = (a.shape.rows() + kSharingRows - 1) / kSharingRows;
  }
  const int64_t scratch = a.gate.sc != 0 ? a.tasks.columns_each * 8 + 64 : 0;
  parallel_tasks(a.tasks.count(), double(a.shape.elements()) * kWorkPerElement, scratch,
                 [&](int64_t task, void* memory) { run(a, task, memory); });
}

Tensor gated_residual_fwd(Tensor x, Tensor y, Tensor gate, OptionalTensor row_mask,
                          int64_t activation) {
  GatedResidualArgs a = make_args(x, gate, row_mask, activation, false);
  a.x = data(x, a), a.y = data(y, a);
  Tensor out = empty_rows_like(x);
  if (a.shape.elements() == 0) return out;
  a.out = row_data(out);
  a.streamed = past_caches(a.shape, a.dtype, 3);
  RowOperands(a.shape, {&a.x, &a.y, &a.out, &a.gate, &a.mask}).fewest_rows(a.out);
  run_rows(a, MMFAST_TABLE(gated_residual).fwd);
  return out;
}

// How the sums of a gate's gradient are cut. From the shape alone: see gated_residual_sums.h.
void cut_sums(GatedResidualArgs& a) {
  const RowShape& s = a.shape;
  const bool has0 = a.dgate.s0 != 0 || s.n0 == 1, has1 = a.dgate.s1 != 0 || s.n1 == 1;
  a.groups = has0 && has1 ? s.rows() : has0 ? s.n0 : 1;
  a.reduced = s.rows() / a.groups;
  int64_t elements = kTaskElements;
  a.columns_each = std::min(s.columns, 2 * kTaskElements);
  if (a.gate.sc != 0) {
    // Many rows a chunk: its sums are as long as a row. Whole rows stay whole while they are many.
    elements = 4 * kTaskElements;
    const bool whole = s.columns <= 1024 || (s.columns <= 4096 && s.elements() >= (1 << 22));
    a.columns_each = whole ? s.columns : 1024;
  } else if (a.columns_each < s.columns) {
    a.columns_each = kTaskElements;
  }
  a.column_tasks = (s.columns + a.columns_each - 1) / a.columns_each;
  const int64_t least = a.gate.sc != 0 ? 32 : 1;
  const int64_t most = std::max(elements / a.columns_each, least);
  a.chunks = (a.reduced + most - 1) / most;
  a.rows_each = (a.reduced + a.chunks - 1) / a.chunks;
  if (a.chunks == 1 && a.column_tasks == 1)
    a.groups_each = std::max<int64_t>(elements / (a.reduced * a.columns_each), 1);
  a.slots = a.gate.sc != 0 ? a.chunks : a.chunks * a.column_tasks;
}

void run_sums(GatedResidualArgs& a, const GatedResidualKernels& kernels) {
  cut_sums(a);
  const int64_t bytes = a.dtype == DType::F64 ? 8 : 4;
  const int64_t part_bytes = a.slots > 1 ? a.groups * a.slots * a.width() * bytes : 0;
  static thread_local ThreadScratch kept;
  constexpr int64_t kKeptBytes = 1 << 20;  // more is given back after the call
  ThreadScratch large;
  a.parts = (part_bytes <= kKeptBytes ? kept : large).get(part_bytes);
  const double work = double(a.shape.elements()) * kWorkPerElement;
  const int64_t scratch = a.gate.sc != 0 ? (a.columns_each + 64) * 2 * bytes : 0;
  parallel_tasks(a.sum_tasks(), work, scratch,
                 [&](int64_t task, void* memory) { kernels.bwd_sums(a, task, memory); });
  if (a.slots == 1) return;
  const int64_t blocks = (a.width() + kFinishColumns - 1) / kFinishColumns;
  parallel_tasks(a.groups * blocks, double(a.groups * a.slots * a.width()) * kWorkPerElement, 0,
                 [&](int64_t task, void*) { kernels.bwd_finish(a, task, nullptr); });
}

std::tuple<Tensor, Tensor> gated_residual_bwd(Tensor dout, Tensor y, Tensor gate,
                                              OptionalTensor row_mask, int64_t activation,
                                              bool need_dy, bool need_dgate) {
  GatedResidualArgs a = make_args(y, gate, row_mask, activation, true);
  a.y = data(y, a), a.dout = data(dout, a);
  Tensor dy = need_dy ? empty_rows_like(y) : empty_nothing(a.dtype);
  const auto gs = gate.sizes();
  Tensor dgate =
      need_dgate ? empty_cpu<3>({gs[0], gs[1], gs[2]}, a.gate.dtype) : empty_nothing(a.gate.dtype);
  if (a.shape.elements() == 0) {
    fill_zero(dgate);
    return {dy, dgate};
  }
  const GatedResidualKernels& kernels = MMFAST_TABLE(gated_residual);
  a.streamed = past_caches(a.shape, a.dtype, 3);
  if (need_dy) a.dy = row_data(dy);
  if (need_dgate) a.dgate = row_side(dgate);
  RowOperands operands(a.shape, {&a.y, &a.dout, &a.gate, &a.mask, &a.dy, &a.dgate});
  operands.fewest_rows(need_dy ? a.dy : a.y);
  if (!need_dgate) {
    if (need_dy) run_rows(a, kernels.bwd_dy);
    return {dy, dgate};
  }
  const bool has0 = a.dgate.s0 != 0 || a.shape.n0 == 1, has1 = a.dgate.s1 != 0 || a.shape.n1 == 1;
  if (has0 && has1 && a.dgate.sc != 0) {
    run_rows(a, kernels.bwd_full);
    return {dy, dgate};
  }
  if (has1 && !has0) operands.swap_rows();  // the rows of a group follow one another
  run_sums(a, kernels);
  return {dy, dgate};
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mmfast, m) {
  m.def(mmfast::schemas::kGatedResidualFwd);
  m.def(mmfast::schemas::kGatedResidualBwd);
}

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("gated_residual_fwd", TORCH_BOX(&mmfast::gated_residual_fwd));
  m.impl("gated_residual_bwd", TORCH_BOX(&mmfast::gated_residual_bwd));
}
