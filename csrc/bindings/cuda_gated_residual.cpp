// Registration of gated_residual's ops for CUDA tensors. Shapes and dtypes are checked by the
// Python op; what is checked here again is only what would be unsafe.
#include <tuple>

#include "../cuda/column_sums.h"
#include "../cuda/gated_residual.h"
#include "cuda_register.h"
#include "cuda_tensor.h"

namespace mmfast {
namespace {

constexpr int64_t kActivations = 3;

// `gate` is replaced by a contiguous copy where its last dim is not dense, and in the backward
// where it was expanded: its gradient is not, and the two are read and written side by side.
GatedResidualLaunch make_launch(const CudaCall& call, const Tensor& y, Tensor& gate,
                                const OptionalTensor& row_mask, int64_t activation, bool backward) {
  GatedResidualLaunch a;
  call.require(y.dim() == 3, "data must be [B, N, C]");
  a.shape = row_shape(y);
  a.dtype = dtype_of(y);
  call.require(activation >= 0 && activation < kActivations, "no such activation");
  a.activation = int32_t(activation);
  call.takes("gate", gate);
  call.require(broadcasts_to(gate, a.shape, 3), "gate must be [B|1, N|1, C|1]");
  const auto expanded = [&](int64_t dim) {
    return gate.sizes()[dim] > 1 && gate.strides()[dim] == 0;
  };
  if ((gate.sizes()[2] > 1 && gate.strides()[2] != 1) || (backward && (expanded(0) || expanded(1))))
    gate = torch::stable::contiguous(gate);
  a.gate = row_side(gate);
  call.require(a.gate.dtype == a.dtype || a.gate.dtype == DType::F32,
               "gate must have the dtype of the data or float32");
  if (row_mask.has_value()) {
    call.takes("row_mask", row_mask);
    call.require(
        row_mask->scalar_type() == ScalarType::Bool && broadcasts_to(*row_mask, a.shape, 2),
        "row_mask must be bool [B|1, N|1]");
    a.mask = row_flags(*row_mask);
  }
  return a;
}

const GatedResidualCuda& kernels(DType dtype) {
  return dtype == DType::F32    ? gated_residual_cuda_f32
         : dtype == DType::BF16 ? gated_residual_cuda_bf16
                                : gated_residual_cuda_f16;
}

Tensor forward(Tensor x, Tensor y, Tensor gate, OptionalTensor row_mask, int64_t activation) {
  const CudaCall call("gated_residual", "x", x);
  GatedResidualLaunch a = make_launch(call, x, gate, row_mask, activation, false);
  a.x = row_data(call, "x", x, a.shape, a.dtype), a.y = row_data(call, "y", y, a.shape, a.dtype);
  Tensor out = empty_rows_like(x, call.place());
  if (a.shape.elements() == 0) return out;
  a.out = row_data(out);
  RowOperands operands(a.shape, {&a.x, &a.y, &a.out, &a.gate, &a.mask});
  operands.fewest_rows(a.out);
  if (a.shape.n0 > a.shape.n1) operands.swap_rows();  // tiles are of rows of one n0
  plan_gated_residual_fwd(a);
  kernels(a.dtype).fwd(a, call.stream());
  return out;
}

// The gate's gradient as a sum: the partial sums that blocks leave, then their sums.
void sum_gradient(const CudaCall& call, GatedResidualLaunch& a, RowOperands& operands,
                  bool per_item, bool per_place) {
  if (per_place) operands.swap_rows();  // the rows of a sum follow one another
  if (!per_item && !per_place) {
    operands.merge_rows();
    if (a.shape.n0 > a.shape.n1) operands.swap_rows();
  }
  plan_gated_residual_bwd(a);
  const int64_t group = gated_residual_parts(a), width = gated_residual_width(a);
  const int64_t chunks = a.shape.n0 * group;
  const Tensor parts = call.workspace(chunks * width * int64_t(sizeof(float)));
  a.parts = static_cast<float*>(parts.data_ptr());
  const Stream stream = call.stream();
  kernels(a.dtype).bwd(a, stream);
  ColumnSumsArgs sums;
  sums.partials = a.parts;
  sums.chunks = chunks, sums.columns = width, sums.slots = 1;
  sums.group = per_item || per_place ? group : chunks;
  sums.out[0] = a.dgate.data, sums.out_stride[0] = width, sums.out_dtype[0] = a.dgate.dtype;
  column_sums(sums, stream);
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor y, Tensor gate, OptionalTensor row_mask,
                                    int64_t activation, bool need_dy, bool need_dgate) {
  const CudaCall call("gated_residual", "y", y);
  GatedResidualLaunch a = make_launch(call, y, gate, row_mask, activation, true);
  a.y = row_data(call, "y", y, a.shape, a.dtype),
  a.dout = row_data(call, "dout", dout, a.shape, a.dtype);
  Tensor dy = need_dy ? empty_rows_like(y, call.place()) : call.nothing(a.dtype);
  const auto gs = gate.sizes();
  Tensor dgate =
      need_dgate ? call.empty<3>({gs[0], gs[1], gs[2]}, a.gate.dtype) : call.nothing(a.gate.dtype);
  if (a.shape.elements() == 0) {
    call.zero(dgate);
    return {dy, dgate};
  }
  if (!need_dy && !need_dgate) return {dy, dgate};
  if (need_dy) a.dy = row_data(dy);
  if (need_dgate) a.dgate = row_side(dgate);
  const bool per_item = gs[0] == a.shape.n0, per_place = gs[1] == a.shape.n1;
  const bool per_channel = gs[2] == a.shape.columns;
  RowOperands operands(a.shape, {&a.y, &a.dout, &a.gate, &a.mask, &a.dy, &a.dgate});
  if (need_dgate && !(per_item && per_place)) {
    a.gradient = GateGradient::SUMS;
    sum_gradient(call, a, operands, per_item, per_place);
    return {dy, dgate};
  }
  const RowOperand& first = need_dy ? a.dy : a.y;
  if (need_dgate && !per_channel) {
    a.gradient = GateGradient::ROWS;
    operands.order_by_memory(first);
    operands.merge_rows();
  } else {
    operands.fewest_rows(first);
  }
  if (a.shape.n0 > a.shape.n1) operands.swap_rows();
  plan_gated_residual_bwd(a);
  kernels(a.dtype).bwd(a, call.stream());
  return {dy, dgate};
}

}  // namespace
}  // namespace mmfast

MMFAST_CUDA_LIBRARY(m) {
  m.def(mmfast::schemas::kGatedResidualFwd);
  m.def(mmfast::schemas::kGatedResidualBwd);
}

MMFAST_CUDA_IMPL(m) {
  m.impl("gated_residual_fwd", TORCH_BOX(&mmfast::forward));
  m.impl("gated_residual_bwd", TORCH_BOX(&mmfast::backward));
}
