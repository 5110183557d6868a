// Registration of adaptation_gate for CUDA tensors: tensors -> AdaptationGateFwdArgs and
// AdaptationGateBwdArgs, the memory of results. Shapes and dtypes are checked by the Python op;
// what is checked here again is only what would be unsafe.
#include <tuple>
#include <vector>

#include "../cuda/adaptation_gate.h"
#include "cuda_register.h"
#include "cuda_tensor.h"

namespace mmfast {
namespace {

constexpr char kOp[] = "adaptation_gate";

RowOperand vector(const CudaCall& call, const char* name, const OptionalTensor& t,
                  const RowShape& shape, DType storage) {
  call.takes(name, t);
  return row_vector(t, shape, storage, kOp);
}

RowOperand flags(const CudaCall& call, const OptionalTensor& row_mask, const RowShape& shape) {
  if (!row_mask.has_value()) return {};
  call.takes("row_mask", *row_mask);
  call.require(row_mask->scalar_type() == ScalarType::Bool && broadcasts_to(*row_mask, shape, 2),
               "row_mask must be bool [B or 1, N or 1]");
  return row_flags(*row_mask);
}

RowShape shape_of(const CudaCall& call, const Tensor& z) {
  call.require(z.dim() == 3, "z must be [B, N, C]");
  return row_shape(z);
}

Tensor forward(Tensor z, Tensor h, OptionalTensor weight, OptionalTensor bias,
               OptionalTensor row_mask, double beta, double eps) {
  const CudaCall call(kOp, "z", z);
  AdaptationGateFwdArgs a;
  a.shape = shape_of(call, z);
  const DType dtype = dtype_of(z);
  a.beta = float(beta);
  a.eps = float(eps);
  a.z = row_data(call, "z", z, a.shape, dtype);
  a.h = row_data(call, "h", h, a.shape, dtype);
  a.weight = vector(call, "weight", weight, a.shape, dtype);
  a.bias = vector(call, "bias", bias, a.shape, dtype);
  a.row_mask = flags(call, row_mask, a.shape);
  Tensor out = empty_rows_like(z, call.place());
  a.out = row_data(out);
  if (a.shape.elements() > 0) adaptation_gate_fwd(a, call.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, Tensor z, Tensor h,
                                                    OptionalTensor weight, OptionalTensor bias,
                                                    OptionalTensor row_mask, double beta,
                                                    double eps, std::vector<bool> needs) {
  const CudaCall call(kOp, "z", z);
  call.require(needs.size() == 4, "needs has 4 flags");
  AdaptationGateBwdArgs a;
  a.shape = shape_of(call, z);
  const DType dtype = dtype_of(z);
  a.beta = float(beta);
  a.eps = float(eps);
  a.z = row_data(call, "z", z, a.shape, dtype);
  a.h = row_data(call, "h", h, a.shape, dtype);
  a.dout = row_data(call, "dout", dout, a.shape, dtype);
  a.weight = vector(call, "weight", weight, a.shape, dtype);
  (void)vector(call, "bias", bias, a.shape, dtype);
  a.row_mask = flags(call, row_mask, a.shape);

  const Place& at = call.place();
  Tensor dz = needs[0] ? empty_rows_like(z, at) : call.nothing(dtype);
  Tensor dh = needs[1] ? empty_rows_like(h, at) : call.nothing(dtype);
  if (needs[0]) a.dz = row_data(dz);
  if (needs[1]) a.dh = row_data(dh);
  Tensor dweight = row_vector_gradient(weight, needs[2], dtype, a.dweight, at);
  Tensor dbias = row_vector_gradient(bias, needs[3], dtype, a.dbias, at);
  if (a.shape.elements() == 0) {
    for (const Tensor& t : {dweight, dbias}) call.zero(t);
  } else if (a.dz.data != nullptr || a.dh.data != nullptr || a.dweight.data != nullptr ||
             a.dbias.data != nullptr) {
    const Tensor workspace = call.workspace(adaptation_gate_bwd_workspace(a));
    adaptation_gate_bwd(a, workspace.data_ptr(), call.stream());
  }
  return {dz, dh, dweight, dbias};
}

}  // namespace
}  // namespace mmfast

MMFAST_CUDA_LIBRARY(m) {
  m.def(mmfast::schemas::kAdaptationGateFwd);
  m.def(mmfast::schemas::kAdaptationGateBwd);
}

MMFAST_CUDA_IMPL(m) {
  m.impl("adaptation_gate_fwd", TORCH_BOX(&mmfast::forward));
  m.impl("adaptation_gate_bwd", TORCH_BOX(&mmfast::backward));
}
