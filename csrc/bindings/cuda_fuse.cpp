// Registration of fuse's ops for CUDA tensors: tensors -> FuseLaunch, in which order rows are
// taken, and the second stage of the gradient of shared logits. Shapes and dtypes are checked by
// the Python op; what is checked here again is only what would be unsafe.
#include <tuple>
#include <vector>

#include "../cuda/column_sums.h"
#include "../cuda/fuse.h"
#include "cuda_register.h"
#include "cuda_tensor.h"

namespace mmfast {
namespace {

RowOperand rows_like(const CudaCall& call, const char* name, const Tensor& t, const FuseLaunch& a) {
  call.takes(name, t);
  call.require(t.dim() == 3 && dtype_of(t) == a.dtype,
               "features and dout have one dtype and 3 dims");
  const RowShape s = row_shape(t);
  call.require(s.n0 == a.shape.n0 && s.n1 == a.shape.n1 && s.columns == a.shape.columns,
               "features and dout must have one shape");
  call.require(s.columns <= 1 || t.numel() == 0 || t.strides()[2] == 1,
               "the last dim of features and dout must have stride 1");
  return row_data(t);
}

// Logits and their gradient. Without channels they have one value a row, whatever the columns.
RowOperand gates(const Tensor& t, bool per_channel) {
  const int64_t s0 = stride_or_zero(t, 0), s1 = stride_or_zero(t, 1);
  return {t.data_ptr(), s0, s1, per_channel ? 1 : 0, dtype_of(t), !per_channel};
}

// The tensors of a call as rows, which the launch gets once their order is chosen.
struct Rows {
  RowOperand x[kFuseModalities], dx[kFuseModalities], out, dout;
};

FuseLaunch make_launch(const CudaCall& call, const std::vector<Tensor>& features,
                       const Tensor& logits, const OptionalTensor& present, int64_t mode,
                       Rows& rows) {
  FuseLaunch a;
  a.K = int32_t(features.size());
  call.require(mode >= int64_t(FuseKind::SOFTMAX) && mode <= int64_t(FuseKind::PAIR),
               "no such mode");
  a.mode = FuseKind(mode);
  call.require(a.mode != FuseKind::PAIR || a.K == 2, "one logit for a pair needs two modalities");
  a.gates = a.mode == FuseKind::PAIR ? 1 : a.K;
  call.require(features[0].dim() == 3, "features have 3 dims");
  a.shape = row_shape(features[0]);
  a.dtype = dtype_of(features[0]);
  for (int32_t k = 0; k < a.K; ++k)
    rows.x[k] = rows_like(call, "a feature", features[size_t(k)], a);

  call.takes("logits", logits);
  call.require(logits.dim() == 4, "logits have 4 dims");
  const auto ls = logits.sizes(), strides = logits.strides();
  call.require((ls[0] == 1 || ls[0] == a.shape.n0) && (ls[1] == 1 || ls[1] == a.shape.n1) &&
                   ls[2] == a.gates && (ls[3] == 1 || ls[3] == a.shape.columns),
               "logits must be [B or 1, N or 1, K (1 for a pair), C or 1]");
  a.per_channel = ls[3] > 1;
  call.require(!a.per_channel || logits.numel() == 0 || strides[3] == 1,
               "the last dim of logits must have stride 1");
  a.logits = gates(logits, a.per_channel);
  call.require(a.logits.dtype == a.dtype || a.logits.dtype == DType::F32,
               "logits have the dtype of the features or float32");
  a.logits_k = strides[2];
  if (present.has_value()) {
    call.takes("present", present);
    call.require(present->scalar_type() == ScalarType::Bool && present->is_contiguous() &&
                     present->dim() == 2 && present->size(0) == a.shape.n0 &&
                     present->size(1) == a.K,
                 "present must be contiguous bool [B, K]");
    a.present = {present->data_ptr(), a.shape.n0 == 1 ? 0 : int64_t(a.K), 0, 0, DType::F32, true};
  }
  return a;
}

CudaCall make_call(const std::vector<Tensor>& features) {
  if (features.empty() || features.size() > size_t(kFuseModalities))
    throw std::runtime_error("mmfast::fuse: the CUDA kernels take 1 to 64 modalities");
  return CudaCall("fuse", "features[0]", features[0]);
}

void add_rows(RowOperands& operands, FuseLaunch& a, Rows& rows) {
  for (int32_t k = 0; k < a.K; ++k) operands.add(rows.x[k]), operands.add(rows.dx[k]);
  operands.add(rows.out);
  operands.add(rows.dout);
  operands.add(a.logits);
  operands.add(a.dlogits);
  operands.add(a.present);
}

void take_rows(FuseLaunch& a, const Rows& rows) {
  const auto short_form = [](const RowOperand& x) -> FuseRows { return {x.data, x.s0, x.s1}; };
  for (int32_t k = 0; k < a.K; ++k)
    a.x[k] = short_form(rows.x[k]), a.dx[k] = short_form(rows.dx[k]);
  a.out = short_form(rows.out), a.dout = short_form(rows.dout);
}

const FuseCuda& kernels(DType dtype) {
  return dtype == DType::F32    ? fuse_cuda_f32
         : dtype == DType::BF16 ? fuse_cuda_bf16
                                : fuse_cuda_f16;
}

Tensor forward(std::vector<Tensor> features, Tensor logits, OptionalTensor present, int64_t mode) {
  const CudaCall call = make_call(features);
  Rows rows;
  FuseLaunch a = make_launch(call, features, logits, present, mode, rows);
  Tensor out = empty_rows_like(features[0], call.place());
  if (a.shape.elements() == 0) return out;
  rows.out = row_data(out);
  RowOperands operands(a.shape, {});
  add_rows(operands, a, rows);
  operands.fewest_rows(rows.out);
  if (a.shape.n0 > a.shape.n1) operands.swap_rows();  // tiles are of rows of one n0
  take_rows(a, rows);
  plan_fuse_fwd(a);
  kernels(a.dtype).fwd(a, call.stream());
  return out;
}

// The rows of each sum become an item's; without sums, as few items as there can be.
void order_rows(FuseLaunch& a, Rows& rows, bool per_item, bool per_place) {
  RowOperands operands(a.shape, {});
  add_rows(operands, a, rows);
  if (a.sums && per_place) {
    operands.swap_rows();
  } else if (!a.sums || !per_item) {
    operands.order_by_memory(rows.dout);
    operands.merge_rows();
    if (a.shape.n0 > a.shape.n1) operands.swap_rows();
  }
}

std::tuple<std::vector<Tensor>, Tensor> backward(Tensor dout, std::vector<Tensor> features,
                                                 Tensor logits, OptionalTensor present,
                                                 int64_t mode, bool need_dfeatures,
                                                 bool need_dlogits) {
  const CudaCall call = make_call(features);
  Rows rows;
  FuseLaunch a = make_launch(call, features, logits, present, mode, rows);
  rows.dout = rows_like(call, "dout", dout, a);
  std::vector<Tensor> dfeatures;
  if (need_dfeatures) {
    dfeatures.reserve(features.size());
    for (size_t k = 0; k < features.size(); ++k) {
      dfeatures.push_back(empty_rows_like(features[k], call.place()));
      rows.dx[k] = row_data(dfeatures.back());
    }
  }
  const auto ls = logits.sizes();
  Tensor dlogits = need_dlogits ? call.empty<4>({ls[0], ls[1], ls[2], ls[3]}, a.logits.dtype)
                                : call.nothing(a.logits.dtype);
  if (a.shape.elements() == 0) {
    call.zero(dlogits);
    return {dfeatures, dlogits};
  }
  if (!need_dfeatures && !need_dlogits) return {dfeatures, dlogits};
  const bool per_item = ls[0] == a.shape.n0, per_place = ls[1] == a.shape.n1;
  a.need_dx = need_dfeatures, a.need_dlogits = need_dlogits;
  a.sums = need_dlogits && !(per_item && per_place);
  if (need_dlogits && !a.sums) {
    a.dlogits = gates(dlogits, a.per_channel);
    a.dlogits_k = dlogits.strides()[2];
  }
  order_rows(a, rows, per_item, per_place);
  take_rows(a, rows);
  plan_fuse_bwd(a);
  const Stream stream = call.stream();
  if (!a.sums) {
    kernels(a.dtype).bwd(a, stream);
    return {dfeatures, dlogits};
  }
  const int64_t width = a.gates * (a.per_channel ? a.shape.columns : 1);
  const int64_t chunks = a.shape.n0 * a.tiles.tiles_n;
  const Tensor parts = call.workspace(chunks * width * int64_t(sizeof(float)));
  a.parts = static_cast<float*>(parts.data_ptr());
  kernels(a.dtype).bwd(a, stream);
  ColumnSumsArgs sums;
  sums.partials = a.parts;
  sums.chunks = chunks, sums.columns = width, sums.slots = 1;
  sums.group = per_item || per_place ? int64_t(a.tiles.tiles_n) : chunks;
  sums.out[0] = dlogits.data_ptr(), sums.out_stride[0] = width;
  sums.out_dtype[0] = a.logits.dtype;
  column_sums(sums, stream);
  return {dfeatures, dlogits};
}

}  // namespace
}  // namespace mmfast

MMFAST_CUDA_LIBRARY(m) {
  m.def(mmfast::schemas::kFuseFwd);
  m.def(mmfast::schemas::kFuseBwd);
}

MMFAST_CUDA_IMPL(m) {
  m.impl("fuse_fwd", TORCH_BOX(&mmfast::forward));
  m.impl("fuse_bwd", TORCH_BOX(&mmfast::backward));
}
