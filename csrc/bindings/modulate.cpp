// Registration of modulate for CPU tensors: tensors -> ModulateArgs, the memory of results, and the
// order of the passes. Shapes and dtypes are checked by the Python op; what is checked here again
// is only what would be unsafe.
#include "../cpu/modulate.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "parallel.h"
#include "rows.h"
#include "schemas.h"

namespace mmfast {
namespace {

void require(bool condition, const char* what) { require_rows(condition, "modulate", what); }

struct Conditions {
  const OptionalTensor &gate, &scale, &shift, &weight, &bias;
  int64_t norm;
  double eps;
};

// Dense where its dims are dense: what the kernels read a whole row of.
bool dense_rows(const Tensor& t) {
  return t.dim() == 3 && (t.sizes()[2] <= 1 || t.numel() == 0 || t.strides()[2] == 1);
}

RowOperand data(const Tensor& t, const ModulateArgs& a, DType dtype) {
  require(dense_rows(t) && dtype_of(t) == dtype, "data must be [B, N, C] of one dtype");
  const auto s = t.sizes();
  require(s[0] == a.shape.n0 && s[1] == a.shape.n1 && s[2] == a.shape.columns,
          "data must have one shape");
  return row_data(t);
}

RowOperand side(const OptionalTensor& t, const ModulateArgs& a, DType storage) {
  if (!t.has_value()) return {};
  require(broadcasts_to(*t, a.shape, 3) && dense_rows(*t) && t->sizes()[2] == a.shape.columns,
          "scale, shift and gate must be [B or 1, N or 1, C]");
  const DType dtype = dtype_of(*t);
  require(dtype == storage || (storage != DType::F64 && dtype == DType::F32),
          "a side tensor must have the dtype of x or float32");
  return row_side(*t);
}

// A side tensor that has rows of its own, or items of its own.
bool has_rows(const OptionalTensor& t) { return t.has_value() && t->sizes()[1] > 1; }
bool has_items(const OptionalTensor& t) { return t.has_value() && t->sizes()[0] > 1; }

ModulateArgs make_args(const Tensor& x, const Conditions& c) {
  require(x.dim() == 3, "x must be [B, N, C]");
  ModulateArgs a;
  a.shape = row_shape(x);
  const DType dtype = dtype_of(x);
  a.x = data(x, a, dtype);
  a.gate = side(c.gate, a, dtype);
  a.scale = side(c.scale, a, dtype);
  a.shift = side(c.shift, a, dtype);
  a.weight = row_vector(c.weight, a.shape, dtype, "modulate");
  a.bias = row_vector(c.bias, a.shape, dtype, "modulate");
  require(c.norm >= kNormNone && c.norm <= kNormRms, "norm is 0, 1 or 2");
  a.norm = int(c.norm);
  a.eps = c.eps;
  const bool by_item = a.shape.n1 > 1 && ((has_items(c.gate) && !has_rows(c.gate)) ||
                                          (has_items(c.scale) && !has_rows(c.scale)) ||
                                          (has_items(c.shift) && !has_rows(c.shift)));
  const auto by_row = [&](const OptionalTensor& t) {
    return has_rows(t) || (!by_item && has_items(t));
  };
  a.gate_by_row = by_row(c.gate);
  a.scale_by_row = by_row(c.scale);
  a.shift_by_row = by_row(c.shift);
  a.groups = by_item ? a.shape.n0 : 1;
  a.group_rows = a.shape.rows() / std::max<int64_t>(a.groups, 1);
  return a;
}

void cut_rows(ModulateArgs& a, int64_t pieces) {
  a.chunk_rows = whole_rows_each(a.shape, a.group_rows, pieces);
  a.chunks = (a.group_rows + a.chunk_rows - 1) / a.chunk_rows;
}

std::tuple<Tensor, Tensor> forward(Tensor x, OptionalTensor residual, OptionalTensor gate,
                                   OptionalTensor scale, OptionalTensor shift,
                                   OptionalTensor weight, OptionalTensor bias, int64_t norm,
                                   double eps) {
  ModulateArgs a = make_args(x, {gate, scale, shift, weight, bias, norm, eps});
  const DType dtype = dtype_of(x);
  Tensor out = empty_rows_like(x);
  a.out = row_data(out);
  Tensor h = residual.has_value() ? empty_rows_like(x) : empty_nothing(dtype);
  if (residual.has_value()) {
    a.residual = data(*residual, a, dtype);
    a.h = row_data(h);
  } else {
    require(!gate.has_value(), "a gate needs a residual");
  }
  if (a.shape.elements() == 0) return {out, h};
  a.past_caches = past_caches(a.shape, dtype, residual.has_value() ? 4 : 2);
  if (a.groups == 1)
    RowOperands(a.shape, {&a.x, &a.residual, &a.gate, &a.scale, &a.shift, &a.out, &a.h})
        .order_by_memory(a.x);
  cut_rows(a, 32);
  const ModulateKernels& kernels = MMFAST_KERNELS(modulate, dtype);
  parallel_tasks(a.groups * a.chunks, double(a.shape.elements()) * 6, kernels.fwd_scratch(a),
                 [&](int64_t task, void* scratch) { kernels.fwd(a, task, scratch); });
  return {out, h};
}

// ---- backward ---------------------------------------------------------------------------------

// The gradient of a side tensor. By row it is written row by row: into the result, or where items
// share it into [B, N, C] of the compute type, which is then summed over the items.
struct SideGradient {
  Tensor result;
  OptionalTensor per_item;

  SideGradient(const OptionalTensor& t, bool needed, bool by_row, const ModulateArgs& a,
               DType storage, RowOperand& operand)
      : result(needed && t.has_value() ? make(*t) : empty_nothing(storage)) {
    if (!needed || !t.has_value()) return;
    const DType acc = accumulate_dtype(storage);
    if (by_row && t->sizes()[0] != a.shape.n0) {
      per_item = empty_cpu<3>({a.shape.n0, a.shape.n1, a.shape.columns}, acc);
      operand = row_data(*per_item);
    } else {
      operand = row_side(result);
    }
  }
  static Tensor make(const Tensor& t) {
    const auto s = t.sizes();
    return empty_rows(t, {s[0], s[1], s[2]}, dtype_of(t));
  }
  void sum_items(const ModulateKernels& kernels) const {
    if (!per_item.has_value()) return;
    const auto s = per_item->sizes();
    const int64_t count = s[1] * s[2], piece = 16384;
    const DType acc = dtype_of(*per_item), dtype = dtype_of(result);
    const auto at = [](const Tensor& t, int64_t elements, DType d) {
      return static_cast<char*>(t.data_ptr()) + elements * dtype_bytes(d);
    };
    parallel_tasks(
        (count + piece - 1) / piece, double(count) * double(s[0]), 0, [&](int64_t task, void*) {
          const int64_t from = task * piece;
          kernels.sum_items(at(*per_item, from, acc), s[0], count, std::min(piece, count - from),
                            at(result, from, dtype), dtype);
        });
  }
};

// Which sums over rows the gradients are made of, and memory for what each task adds.
Tensor make_sums(ModulateArgs& a, DType storage) {
  const bool dout = a.dout.data != nullptr;
  const bool scale = a.dscale.data != nullptr && !a.scale_by_row;
  const bool shift = a.dshift.data != nullptr && !a.shift_by_row;
  const bool of_d = dout && (scale || (shift && !a.scale_by_row) || a.dweight.data != nullptr ||
                             a.dbias.data != nullptr);
  void** wanted[4] = {};
  int64_t count = 0;
  if (of_d) wanted[count++] = &a.sum_d_n, wanted[count++] = &a.sum_d;
  if (dout && shift && a.scale_by_row) wanted[count++] = &a.sum_dout;
  if (a.dgate.data != nullptr && !a.gate_by_row) wanted[count++] = &a.sum_gate;
  if (count == 0) return empty_nothing(storage);
  const DType acc = accumulate_dtype(storage);
  a.sum_stride = (a.shape.columns + 15) / 16 * 16;
  const int64_t each = a.groups * a.chunks * a.sum_stride;
  Tensor sums = empty_cpu<2>({count, each}, acc);
  for (int64_t i = 0; i < count; ++i)
    *wanted[i] = static_cast<char*>(sums.data_ptr()) + i * each * dtype_bytes(acc);
  return sums;
}

void run_backward(ModulateArgs& a, const ModulateKernels& kernels, DType dtype) {
  if (a.groups == 1)
    RowOperands(a.shape, {&a.x, &a.h, &a.dout, &a.dh, &a.gate, &a.scale, &a.shift, &a.dx,
                          &a.dresidual, &a.dgate, &a.dscale, &a.dshift})
        .order_by_memory(a.x);
  cut_rows(a, 64);
  const Tensor sums = make_sums(a, dtype);
  a.past_caches = past_caches(a.shape, dtype, a.residual_given ? 6 : 3);
  parallel_tasks(a.groups * a.chunks, double(a.shape.elements()) * 12, kernels.bwd_scratch(a),
                 [&](int64_t task, void* scratch) { kernels.bwd(a, task, scratch); });
  const bool columns = (a.dscale.data != nullptr && !a.scale_by_row) ||
                       (a.dshift.data != nullptr && !a.shift_by_row) ||
                       (a.dgate.data != nullptr && !a.gate_by_row) || a.dweight.data != nullptr ||
                       a.dbias.data != nullptr;
  if (!columns) return;
  const int64_t tasks = (a.shape.columns + kModulateColumns - 1) / kModulateColumns;
  parallel_tasks(tasks, double(a.groups * a.chunks) * double(a.shape.columns) * 4, 0,
                 [&](int64_t task, void*) { kernels.bwd_columns(a, task); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    OptionalTensor dout, OptionalTensor dh, Tensor x, OptionalTensor h, OptionalTensor gate,
    OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, int64_t norm, double eps,
    OptionalTensor shift, std::vector<bool> needs) {
  require(needs.size() == 7, "needs has 7 flags");
  require(h.has_value() || (!gate.has_value() && !dh.has_value()), "a gate and dh go with h");
  ModulateArgs a = make_args(x, {gate, scale, shift, weight, bias, norm, eps});
  const DType dtype = dtype_of(x);
  a.residual_given = h.has_value();
  a.h = h.has_value() ? data(*h, a, dtype) : a.x;
  if (dout.has_value()) a.dout = data(*dout, a, dtype);
  if (dh.has_value()) a.dh = data(*dh, a, dtype);

  Tensor dx = needs[0] ? empty_rows_like(x) : empty_nothing(dtype);
  Tensor dresidual = needs[1] && h.has_value() ? empty_rows_like(*h) : empty_nothing(dtype);
  if (needs[0]) a.dx = row_data(dx);
  if (needs[1] && h.has_value()) a.dresidual = row_data(dresidual);
  const SideGradient dgate(gate, needs[2], a.gate_by_row, a, dtype, a.dgate);
  const SideGradient dscale(scale, needs[3], a.scale_by_row, a, dtype, a.dscale);
  const SideGradient dshift(shift, needs[4], a.shift_by_row, a, dtype, a.dshift);
  Tensor dweight = row_vector_gradient(weight, needs[5], dtype, a.dweight);
  Tensor dbias = row_vector_gradient(bias, needs[6], dtype, a.dbias);

  if (a.shape.elements() == 0 || (a.dout.data == nullptr && a.dh.data == nullptr)) {
    for (const Tensor& t :
         {dx, dresidual, dgate.result, dscale.result, dshift.result, dweight, dbias})
      fill_zero(t);
  } else {
    const ModulateKernels& kernels = MMFAST_KERNELS(modulate, dtype);
    run_backward(a, kernels, dtype);
    for (const SideGradient* g : {&dgate, &dscale, &dshift}) g->sum_items(kernels);
  }
  return {dx, dresidual, dgate.result, dscale.result, dshift.result, dweight, dbias};
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mmfast, m) {
  m.def(mmfast::schemas::kModulateFwd);
  m.def(mmfast::schemas::kModulateBwd);
}

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("modulate_fwd", TORCH_BOX(&mmfast::forward));
  m.impl("modulate_bwd", TORCH_BOX(&mmfast::backward));
}
