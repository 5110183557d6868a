// Registration of adaptation_gate for CPU tensors: tensors -> AdaptationGateArgs, the memory of
// results, and the order of the passes. Shapes and dtypes are checked by the Python op; what is
// checked here again is only what would be unsafe.
#include "../cpu/adaptation_gate.h"

#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "parallel.h"
#include "rows.h"
#include "schemas.h"

namespace mmfast {
namespace {

void require(bool condition, const char* what) { require_rows(condition, "adaptation_gate", what); }

RowOperand data(const Tensor& t, const RowShape& shape, DType dtype) {
  require(t.dim() == 3 && dtype_of(t) == dtype, "data must be [B, N, C] of one dtype");
  const auto s = t.sizes();
  require(s[0] == shape.n0 && s[1] == shape.n1 && s[2] == shape.columns,
          "data must have one shape");
  require(s[2] <= 1 || t.numel() == 0 || t.strides()[2] == 1, "the last dim of data must be dense");
  return row_data(t);
}

AdaptationGateArgs make_args(const Tensor& z, const Tensor& h, const OptionalTensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& row_mask,
                             double beta, double eps) {
  require(z.dim() == 3, "z must be [B, N, C]");
  AdaptationGateArgs a;
  a.shape = row_shape(z);
  const DType dtype = dtype_of(z);
  a.z = data(z, a.shape, dtype);
  a.h = data(h, a.shape, dtype);
  a.weight = row_vector(weight, a.shape, dtype, "adaptation_gate");
  a.bias = row_vector(bias, a.shape, dtype, "adaptation_gate");
  if (row_mask.has_value()) {
    require(row_mask->scalar_type() == ScalarType::Bool && broadcasts_to(*row_mask, a.shape, 2),
            "row_mask must be bool [B or 1, N or 1]");
    a.row_mask = row_flags(*row_mask);
  }
  a.beta = beta;
  a.eps = eps;
  return a;
}

void cut_rows(AdaptationGateArgs& a, int64_t pieces) {
  a.chunk_rows = whole_rows_each(a.shape, a.shape.rows(), pieces);
  a.chunks = (a.shape.rows() + a.chunk_rows - 1) / a.chunk_rows;
}

Tensor forward(Tensor z, Tensor h, OptionalTensor weight, OptionalTensor bias,
               OptionalTensor row_mask, double beta, double eps) {
  AdaptationGateArgs a = make_args(z, h, weight, bias, row_mask, beta, eps);
  Tensor out = empty_rows_like(z);
  if (a.shape.elements() == 0) return out;
  a.out = row_data(out);
  a.past_caches = past_caches(a.shape, a.z.dtype, 3);
  RowOperands(a.shape, {&a.z, &a.h, &a.row_mask, &a.out}).order_by_memory(a.z);
  cut_rows(a, 32);
  const AdaptationGateKernels& kernels = MMFAST_KERNELS(adaptation_gate, a.z.dtype);
  parallel_tasks(a.chunks, double(a.shape.elements()) * 8, kernels.fwd_scratch(a),
                 [&](int64_t task, void* scratch) { kernels.fwd(a, task, scratch); });
  return out;
}

// Memory for what each task adds to the gradients of weight and bias.
Tensor make_sums(AdaptationGateArgs& a) {
  const DType acc = accumulate_dtype(a.z.dtype);
  if (a.dweight.data == nullptr && a.dbias.data == nullptr) return empty_nothing(acc);
  a.sum_stride = (a.shape.columns + 15) / 16 * 16;
  Tensor sums = empty_cpu<3>({2, a.chunks, a.sum_stride}, acc);
  a.sum_d_n = sums.data_ptr();
  a.sum_d = static_cast<char*>(a.sum_d_n) + a.chunks * a.sum_stride * dtype_bytes(acc);
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, Tensor z, Tensor h,
                                                    OptionalTensor weight, OptionalTensor bias,
                                                    OptionalTensor row_mask, double beta,
                                                    double eps, std::vector<bool> needs) {
  require(needs.size() == 4, "needs has 4 flags");
  AdaptationGateArgs a = make_args(z, h, weight, bias, row_mask, beta, eps);
  const DType dtype = a.z.dtype;
  a.dout = data(dout, a.shape, dtype);
  Tensor dz = needs[0] ? empty_rows_like(z) : empty_nothing(dtype);
  Tensor dh = needs[1] ? empty_rows_like(h) : empty_nothing(dtype);
  if (needs[0]) a.dz = row_data(dz);
  if (needs[1]) a.dh = row_data(dh);
  Tensor dweight = row_vector_gradient(weight, needs[2], dtype, a.dweight);
  Tensor dbias = row_vector_gradient(bias, needs[3], dtype, a.dbias);
  if (a.shape.elements() == 0) {
    for (const Tensor& t : {dweight, dbias}) fill_zero(t);
    return {dz, dh, dweight, dbias};
  }
  RowOperands(a.shape, {&a.z, &a.h, &a.dout, &a.row_mask, &a.dz, &a.dh}).order_by_memory(a.z);
  cut_rows(a, 64);
  a.past_caches = past_caches(a.shape, dtype, 5);
  const Tensor sums = make_sums(a);
  const AdaptationGateKernels& kernels = MMFAST_KERNELS(adaptation_gate, dtype);
  parallel_tasks(a.chunks, double(a.shape.elements()) * 16, kernels.bwd_scratch(a),
                 [&](int64_t task, void* scratch) { kernels.bwd(a, task, scratch); });
  if (a.sum_d != nullptr) {
    const int64_t C = a.shape.columns;
    parallel_tasks((C + kAdaptationGateColumns - 1) / kAdaptationGateColumns,
                   double(a.chunks) * double(C) * 4, 0,
                   [&](int64_t task, void*) { kernels.bwd_columns(a, task); });
  }
  return {dz, dh, dweight, dbias};
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mmfast, m) {
  m.def(mmfast::schemas::kAdaptationGateFwd);
  m.def(mmfast::schemas::kAdaptationGateBwd);
}

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("adaptation_gate_fwd", TORCH_BOX(&mmfast::forward));
  m.impl("adaptation_gate_bwd", TORCH_BOX(&mmfast::backward));
}
