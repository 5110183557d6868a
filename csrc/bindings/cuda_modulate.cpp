// Registration of modulate for CUDA tensors: tensors -> ModulateFwdArgs and ModulateBwdArgs, the
// memory of results. Shapes and dtypes are checked by the Python op; what is checked here again is
// only what would be unsafe.
#include <tuple>
#include <vector>

#include "../cuda/modulate.h"
#include "cuda_register.h"
#include "cuda_tensor.h"

namespace mmfast {
namespace {

constexpr char kOp[] = "modulate";

RowOperand side(const CudaCall& call, const char* name, const OptionalTensor& t,
                const RowShape& shape, DType storage) {
  if (!t.has_value()) return {};
  call.takes(name, *t);
  call.require(broadcasts_to(*t, shape, 3) && t->sizes()[2] == shape.columns &&
                   (shape.columns <= 1 || t->numel() == 0 || t->strides()[2] == 1),
               "scale, shift and gate must be [B or 1, N or 1, C]");
  const DType dtype = dtype_of(*t);
  call.require(dtype == storage || dtype == DType::F32,
               "a side tensor must have the dtype of x or float32");
  return row_side(*t);
}

RowOperand vector(const CudaCall& call, const char* name, const OptionalTensor& t,
                  const RowShape& shape, DType storage) {
  call.takes(name, t);
  return row_vector(t, shape, storage, kOp);
}

RowNorm norm_of(const CudaCall& call, int64_t norm) {
  call.require(norm >= 0 && norm <= int64_t(RowNorm::RMS), "norm is 0, 1 or 2");
  return RowNorm(norm);
}

RowShape shape_of(const CudaCall& call, const Tensor& x) {
  call.require(x.dim() == 3, "x must be [B, N, C]");
  return row_shape(x);
}

std::tuple<Tensor, Tensor> forward(Tensor x, OptionalTensor residual, OptionalTensor gate,
                                   OptionalTensor scale, OptionalTensor shift,
                                   OptionalTensor weight, OptionalTensor bias, int64_t norm,
                                   double eps) {
  const CudaCall call(kOp, "x", x);
  ModulateFwdArgs a;
  a.shape = shape_of(call, x);
  const DType dtype = dtype_of(x);
  a.norm = norm_of(call, norm);
  a.eps = float(eps);
  a.x = row_data(call, "x", x, a.shape, dtype);
  a.gate = side(call, "gate", gate, a.shape, dtype);
  a.scale = side(call, "scale", scale, a.shape, dtype);
  a.shift = side(call, "shift", shift, a.shape, dtype);
  a.weight = vector(call, "weight", weight, a.shape, dtype);
  a.bias = vector(call, "bias", bias, a.shape, dtype);
  call.require(residual.has_value() || !gate.has_value(), "a gate needs a residual");
  Tensor out = empty_rows_like(x, call.place());
  a.out = row_data(out);
  Tensor h = residual.has_value() ? empty_rows_like(x, call.place()) : call.nothing(dtype);
  if (residual.has_value()) {
    a.residual = row_data(call, "residual", *residual, a.shape, dtype);
    a.h = row_data(h);
  }
  if (a.shape.elements() > 0) modulate_fwd(a, call.stream());
  return {out, h};
}

// The gradient of a side tensor, and its operand; nothing where it is not needed.
Tensor side_gradient(const CudaCall& call, const OptionalTensor& t, bool needed, DType storage,
                     RowOperand& operand) {
  if (!needed || !t.has_value()) return call.nothing(storage);
  const auto s = t->sizes();
  Tensor result = empty_rows(*t, {s[0], s[1], s[2]}, dtype_of(*t), call.place());
  operand = row_side(result);
  return result;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(OptionalTensor dout, OptionalTensor dh, Tensor x, OptionalTensor h,
                   OptionalTensor gate, OptionalTensor scale, OptionalTensor weight,
                   OptionalTensor bias, int64_t norm, double eps, OptionalTensor shift,
                   std::vector<bool> needs) {
  const CudaCall call(kOp, "x", x);
  call.require(needs.size() == 7, "needs has 7 flags");
  call.require(h.has_value() || (!gate.has_value() && !dh.has_value()), "a gate and dh go with h");
  ModulateBwdArgs a;
  a.shape = shape_of(call, x);
  const DType dtype = dtype_of(x);
  a.norm = norm_of(call, norm);
  a.eps = float(eps);
  const auto row = [&](const char* name, const OptionalTensor& t, RowOperand& operand) {
    if (t.has_value()) operand = row_data(call, name, *t, a.shape, dtype);
  };
  a.x = row_data(call, "x", x, a.shape, dtype);
  a.h = a.x;
  row("h", h, a.h);
  row("dout", dout, a.dout);
  row("dh", dh, a.dh);
  a.gate = side(call, "gate", gate, a.shape, dtype);
  a.scale = side(call, "scale", scale, a.shape, dtype);
  (void)side(call, "shift", shift, a.shape, dtype);
  a.weight = vector(call, "weight", weight, a.shape, dtype);
  a.bias = vector(call, "bias", bias, a.shape, dtype);

  const Place& at = call.place();
  Tensor dx = needs[0] ? empty_rows_like(x, at) : call.nothing(dtype);
  Tensor dresidual = needs[1] && h.has_value() ? empty_rows_like(*h, at) : call.nothing(dtype);
  if (needs[0]) a.dx = row_data(dx);
  if (needs[1] && h.has_value()) a.dresidual = row_data(dresidual);
  Tensor dgate = side_gradient(call, gate, needs[2], dtype, a.dgate);
  Tensor dscale = side_gradient(call, scale, needs[3], dtype, a.dscale);
  Tensor dshift = side_gradient(call, shift, needs[4], dtype, a.dshift);
  Tensor dweight = row_vector_gradient(weight, needs[5], dtype, a.dweight, at);
  Tensor dbias = row_vector_gradient(bias, needs[6], dtype, a.dbias, at);

  const bool nothing = a.shape.elements() == 0 || (!dout.has_value() && !dh.has_value());
  if (nothing)
    for (const Tensor& t : {dx, dresidual, dgate}) call.zero(t);
  if (nothing || !dout.has_value()) {
    for (const Tensor& t : {dscale, dshift, dweight, dbias}) call.zero(t);
    a.dscale = a.dshift = a.dweight = a.dbias = {};
  }
  const auto wanted = {&a.dx, &a.dresidual, &a.dgate, &a.dscale, &a.dshift, &a.dweight, &a.dbias};
  const bool any = std::any_of(wanted.begin(), wanted.end(),
                               [](const RowOperand* x) { return x->data != nullptr; });
  if (!nothing && any) {
    const Tensor workspace = call.workspace(modulate_bwd_workspace(a));
    modulate_bwd(a, workspace.data_ptr(), call.stream());
  }
  return {dx, dresidual, dgate, dscale, dshift, dweight, dbias};
}

}  // namespace
}  // namespace mmfast

MMFAST_CUDA_LIBRARY(m) {
  m.def(mmfast::schemas::kModulateFwd);
  m.def(mmfast::schemas::kModulateBwd);
}

MMFAST_CUDA_IMPL(m) {
  m.impl("modulate_fwd", TORCH_BOX(&mmfast::forward));
  m.impl("modulate_bwd", TORCH_BOX(&mmfast::backward));
}
