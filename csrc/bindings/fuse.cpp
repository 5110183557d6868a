// Registration of fuse's ops for CPU tensors: tensors -> FuseArgs, in which order rows are taken,
// and the sum of what tasks add to the gradient of shared logits. Shapes and dtypes are checked by
// the Python op; what is checked here again is only what would be unsafe.
#include "../cpu/fuse.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "parallel.h"
#include "rows.h"
#include "schemas.h"

namespace mmfast {
namespace {

void require(bool condition, const char* what) { require_rows(condition, "fuse", what); }

RowOperand rows_like(const Tensor& t, const FuseArgs& a, DType dtype, const char* what) {
  require(t.dim() == 3 && dtype_of(t) == dtype, "features and dout have one dtype and 3 dims");
  const auto sizes = t.sizes(), strides = t.strides();
  require(sizes[0] == a.B && sizes[1] == a.N && sizes[2] == a.C, what);
  require(a.C <= 1 || t.numel() == 0 || strides[2] == 1,
          "the last dim of features and dout must have stride 1");
  return {t.data_ptr(), strides[0], strides[1], 1, dtype};
}

FuseArgs make_args(const std::vector<Tensor>& features, const Tensor& logits,
                   const OptionalTensor& present, int64_t mode, std::vector<RowOperand>& rows) {
  FuseArgs a;
  a.K = int64_t(features.size());
  require(a.K >= 1 && a.K <= kFuseMost, "the CPU kernels take 1 to 64 modalities");
  require(mode >= kFuseSoftmax && mode <= kFusePair, "no such mode");
  a.mode = int(mode);
  require(mode != kFusePair || a.K == 2, "one logit for a pair needs two modalities");
  a.gates = mode == kFusePair ? 1 : a.K;
  require(features[0].dim() == 3, "features have 3 dims");
  const auto sizes = features[0].sizes();
  a.B = sizes[0], a.N = sizes[1], a.C = sizes[2];
  const DType storage = dtype_of(features[0]);
  rows.reserve(size_t(a.K));
  for (const Tensor& x : features)
    rows.push_back(rows_like(x, a, storage, "features must have one shape"));
  a.features = rows.data();

  require(logits.dim() == 4, "logits have 4 dims");
  const auto ls = logits.sizes(), strides = logits.strides();
  require((ls[0] == 1 || ls[0] == a.B) && (ls[1] == 1 || ls[1] == a.N) && ls[2] == a.gates &&
              (ls[3] == 1 || ls[3] == a.C),
          "logits must be [B or 1, N or 1, K (1 for a pair), C or 1]");
  a.per_channel = ls[3] > 1;
  require(!a.per_channel || logits.numel() == 0 || strides[3] == 1,
          "the last dim of logits must have stride 1");
  const DType dtype = dtype_of(logits);
  require(dtype == storage || (dtype == DType::F32 && storage != DType::F64),
          "logits have the dtype of the features or float32");
  a.logits = {logits.data_ptr(), stride_or_zero(logits, 0), stride_or_zero(logits, 1), 1, dtype};
  a.logits_k = strides[2];
  const bool every_item = ls[0] == a.B, every_place = ls[1] == a.N;
  a.sharing = every_item && every_place ? FuseSharing::NOTHING
              : every_item              ? FuseSharing::ITEM
              : every_place             ? FuseSharing::PLACE
                                        : FuseSharing::ALL;
  if (present.has_value()) {
    require(present->scalar_type() == ScalarType::Bool && present->is_contiguous() &&
                present->dim() == 2 && present->size(0) == a.B && present->size(1) == a.K,
            "present must be contiguous bool [B, K]");
    a.present = static_cast<const uint8_t*>(present->data_ptr());
  }
  return a;
}

// Whether rows in their order lie one after the other.
bool in_one_run(const FuseArgs& a, const RowOperand& x) {
  const int64_t inner = a.items_inner ? a.B : a.N, outer = a.items_inner ? a.N : a.B;
  const int64_t inner_stride = a.items_inner ? x.s0 : x.s1;
  const int64_t outer_stride = a.items_inner ? x.s1 : x.s0;
  return (inner == 1 || inner_stride == a.C) &&
         (outer == 1 || a.sharing == FuseSharing::ITEM || outer_stride == inner * a.C);
}

void find_one_run(FuseArgs& a) {
  const bool same =
      a.sharing == FuseSharing::ITEM || (a.sharing == FuseSharing::ALL && a.present == nullptr);
  if (a.per_channel || !same) return;
  a.one_run = true;
  for (int64_t k = 0; k < a.K; ++k)
    a.one_run = a.one_run && in_one_run(a, a.features[k]) &&
                (a.dfeatures == nullptr || in_one_run(a, a.dfeatures[k]));
  a.one_run = a.one_run && in_one_run(a, a.out.data != nullptr ? a.out : a.dout);
}

// The order of rows and the tasks, from the shape and the broadcast form alone. Where nothing is
// summed, rows that share logits need no group, unless it saves making the weights again.
void plan(FuseArgs& a, bool sums) {
  if (!sums && !a.per_channel && a.sharing != FuseSharing::ALL) a.sharing = FuseSharing::NOTHING;
  const RowOperand& x = a.features[0];
  const bool items_first_in_memory = a.B > 1 && a.N > 1 && x.s0 < x.s1;
  a.items_inner =
      a.sharing == FuseSharing::PLACE || (a.sharing != FuseSharing::ITEM && items_first_in_memory);
  a.groups = a.sharing == FuseSharing::ITEM ? a.B : a.sharing == FuseSharing::PLACE ? a.N : 1;
  a.group_rows = a.B * a.N / a.groups;
  // A task that sums or that makes a table of weights leaves as much as some rows.
  const bool table = a.per_channel && a.sharing != FuseSharing::NOTHING;
  const int64_t fewest = table ? 32 : 1, most = table ? 256 : 4096;
  a.chunk = std::clamp<int64_t>(32768 / (a.C * std::min<int64_t>(a.K, 4)), fewest, most);
  a.chunks = (a.group_rows + a.chunk - 1) / a.chunk;
  find_one_run(a);
}

// Rough multiply-adds of an element, for choosing the number of threads.
double work(const FuseArgs& a, bool backward) {
  const double each = a.mode == kFuseGmu || a.mode == kFusePair ? 20 : 2;
  const double gate = a.per_channel && a.sharing == FuseSharing::NOTHING ? 15 : 0;
  return double(a.B * a.N) * double(a.C) * double(a.K) * (each + gate) * (backward ? 2 : 1);
}

RowShape shape_of(const FuseArgs& a) { return {a.B, a.N, a.C}; }

Tensor forward(std::vector<Tensor> features, Tensor logits, OptionalTensor present, int64_t mode) {
  std::vector<RowOperand> rows;
  FuseArgs a = make_args(features, logits, present, mode, rows);
  Tensor out = empty_rows_like(features[0]);
  if (shape_of(a).elements() == 0) return out;
  a.out = row_data(out);
  a.past_caches = past_caches(shape_of(a), a.out.dtype, int(a.K) + 1);
  plan(a, false);
  const FuseKernels& table = MMFAST_KERNELS(fuse, a.out.dtype);
  parallel_tasks(a.groups * a.chunks, work(a, false), table.scratch(a),
                 [&](int64_t task, void* scratch) { table.fwd(a, task, scratch); });
  return out;
}

// dlogits from what the tasks left, group by group.
void sum_parts(const FuseArgs& a, const FuseKernels& table, const Tensor& dlogits) {
  constexpr int64_t kPiece = 1024;
  const int64_t width = a.gates * (a.per_channel ? a.C : 1);
  const int64_t pieces = (width + kPiece - 1) / kPiece;
  const DType dtype = a.logits.dtype, acc = accumulate_dtype(a.features[0].dtype);
  char* out = static_cast<char*>(dlogits.data_ptr());
  const char* parts = static_cast<const char*>(a.dlogits_parts);
  parallel_tasks(a.groups * pieces, double(a.groups * a.chunks) * double(width) * 4, 0,
                 [&](int64_t task, void*) {
                   const int64_t group = task / pieces, c = task % pieces * kPiece;
                   table.sum(parts + (group * a.chunks * width + c) * dtype_bytes(acc), a.chunks,
                             width, std::min(kPiece, width - c),
                             out + (group * width + c) * dtype_bytes(dtype), dtype);
                 });
}

std::tuple<std::vector<Tensor>, Tensor> backward(Tensor dout, std::vector<Tensor> features,
                                                 Tensor logits, OptionalTensor present,
                                                 int64_t mode, bool need_dfeatures,
                                                 bool need_dlogits) {
  std::vector<RowOperand> rows, drows;
  FuseArgs a = make_args(features, logits, present, mode, rows);
  const DType storage = rows[0].dtype, acc = accumulate_dtype(storage);
  a.dout = rows_like(dout, a, storage, "dout must have the shape of the features");
  std::vector<Tensor> dfeatures;
  if (need_dfeatures) {
    drows.reserve(size_t(a.K));
    dfeatures.reserve(size_t(a.K));
    for (const Tensor& x : features) {
      dfeatures.push_back(empty_rows_like(x));
      drows.push_back(row_data(dfeatures.back()));
    }
    a.dfeatures = drows.data();
  }
  const auto ls = logits.sizes();
  Tensor dlogits = need_dlogits ? empty_cpu<4>({ls[0], ls[1], ls[2], ls[3]}, a.logits.dtype)
                                : empty_nothing(a.logits.dtype);
  if (shape_of(a).elements() == 0 || !(need_dfeatures || need_dlogits)) {
    fill_zero(dlogits);
    return {dfeatures, dlogits};
  }
  a.need_dlogits = need_dlogits;
  a.dlogits = need_dlogits ? dlogits.data_ptr() : nullptr;
  a.past_caches = past_caches(shape_of(a), storage, int(2 * a.K) + 1);
  plan(a, need_dlogits);
  const FuseKernels& table = MMFAST_KERNELS(fuse, storage);
  const int64_t tasks = a.groups * a.chunks;
  const bool sums = need_dlogits && a.sharing != FuseSharing::NOTHING;
  const int64_t width = a.gates * (a.per_channel ? a.C : 1);
  Tensor parts = sums ? empty_cpu<2>({tasks, width}, acc) : empty_nothing(acc);
  a.dlogits_parts = sums ? parts.data_ptr() : nullptr;
  parallel_tasks(tasks, work(a, true), table.scratch(a),
                 [&](int64_t task, void* scratch) { table.bwd(a, task, scratch); });
  if (sums) sum_parts(a, table, dlogits);
  return {dfeatures, dlogits};
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mmfast, m) {
  m.def(mmfast::schemas::kFuseFwd);
  m.def(mmfast::schemas::kFuseBwd);
}

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("fuse_fwd", TORCH_BOX(&mmfast::forward));
  m.impl("fuse_bwd", TORCH_BOX(&mmfast::backward));
}
