// Registration of glu's and glu_packed's ops for CUDA tensors. Shapes and dtypes are checked by the
// Python op; what is checked here again is only what would be unsafe.
#include <tuple>

#include "../cuda/glu.h"
#include "cuda_register.h"
#include "cuda_tensor.h"

namespace mmfast {
namespace {

constexpr int64_t kActivations = 6;

GluLaunch make_launch(const CudaCall& call, const Tensor& like, int64_t columns,
                      int64_t activation) {
  GluLaunch x;
  call.require(like.dim() == 3, "the tensors have 3 dims");
  call.require(activation >= 0 && activation < kActivations, "no such activation");
  x.shape = row_shape(like);
  x.shape.columns = columns;
  x.dtype = dtype_of(like);
  x.activation = int32_t(activation);
  return x;
}

RowOperand second_half(RowOperand x, int64_t columns) {
  x.data = static_cast<char*>(x.data) + columns * dtype_bytes(x.dtype);
  return x;
}

const GluCuda& kernels(DType dtype) {
  return dtype == DType::F32 ? glu_cuda_f32 : dtype == DType::BF16 ? glu_cuda_bf16 : glu_cuda_f16;
}

void run_fwd(const CudaCall& call, GluLaunch& x) {
  RowOperands operands(x.shape, {&x.a, &x.b, &x.out});
  operands.fewest_rows(x.out);
  if (x.shape.n0 > x.shape.n1) operands.swap_rows();  // tiles are of rows of one n0
  kernels(x.dtype).fwd(x, call.stream());
}

void run_bwd(const CudaCall& call, GluLaunch& x) {
  RowOperands operands(x.shape, {&x.dout, &x.a, &x.b, &x.da, &x.db});
  operands.fewest_rows(x.da);
  if (x.shape.n0 > x.shape.n1) operands.swap_rows();
  kernels(x.dtype).bwd(x, call.stream());
}

Tensor forward(Tensor a, Tensor b, int64_t activation) {
  const CudaCall call("glu", "a", a);
  GluLaunch x = make_launch(call, a, a.dim() == 3 ? a.size(2) : 0, activation);
  x.a = row_data(call, "a", a, x.shape, x.dtype), x.b = row_data(call, "b", b, x.shape, x.dtype);
  Tensor out = empty_rows_like(a, call.place());
  x.out = row_data(out);
  if (x.shape.elements() > 0) run_fwd(call, x);
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor a, Tensor b, int64_t activation) {
  const CudaCall call("glu", "a", a);
  GluLaunch x = make_launch(call, a, a.dim() == 3 ? a.size(2) : 0, activation);
  x.dout = row_data(call, "dout", dout, x.shape, x.dtype);
  x.a = row_data(call, "a", a, x.shape, x.dtype), x.b = row_data(call, "b", b, x.shape, x.dtype);
  Tensor da = empty_rows_like(a, call.place()), db = empty_rows_like(b, call.place());
  x.da = row_data(da), x.db = row_data(db);
  if (x.shape.elements() > 0) run_bwd(call, x);
  return {da, db};
}

GluLaunch make_packed(const CudaCall& call, const Tensor& ab, int64_t activation) {
  call.require(ab.dim() == 3 && ab.size(2) % 2 == 0, "the last dim must be even");
  GluLaunch x = make_launch(call, ab, ab.size(2) / 2, activation);
  x.a = row_data(call, "ab", ab, row_shape(ab), x.dtype);
  x.b = second_half(x.a, x.shape.columns);
  return x;
}

Tensor packed_forward(Tensor ab, int64_t activation) {
  const CudaCall call("glu_packed", "ab", ab);
  GluLaunch x = make_packed(call, ab, activation);
  Tensor out = empty_rows(ab, {x.shape.n0, x.shape.n1, x.shape.columns}, x.dtype, call.place());
  x.out = row_data(out);
  if (x.shape.elements() > 0) run_fwd(call, x);
  return out;
}

Tensor packed_backward(Tensor dout, Tensor ab, int64_t activation) {
  const CudaCall call("glu_packed", "ab", ab);
  GluLaunch x = make_packed(call, ab, activation);
  x.dout = row_data(call, "dout", dout, x.shape, x.dtype);
  Tensor dab = empty_rows_like(ab, call.place());
  x.da = row_data(dab);
  x.db = second_half(x.da, x.shape.columns);
  if (x.shape.elements() > 0) run_bwd(call, x);
  return dab;
}

}  // namespace
}  // namespace mmfast

MMFAST_CUDA_LIBRARY(m) {
  m.def(mmfast::schemas::kGluFwd);
  m.def(mmfast::schemas::kGluBwd);
  m.def(mmfast::schemas::kGluPackedFwd);
  m.def(mmfast::schemas::kGluPackedBwd);
}

MMFAST_CUDA_IMPL(m) {
  m.impl("glu_fwd", TORCH_BOX(&mmfast::forward));
  m.impl("glu_bwd", TORCH_BOX(&mmfast::backward));
  m.impl("glu_packed_fwd", TORCH_BOX(&mmfast::packed_forward));
  m.impl("glu_packed_bwd", TORCH_BOX(&mmfast::packed_backward));
}
