// Registration of glu's and glu_packed's ops for CPU tensors. Shapes and dtypes are checked by the
// Python op; what is checked here again is only what would be unsafe.
#include "../cpu/glu.h"

#include <tuple>

#include "../cpu/isa.h"
#include "parallel.h"
#include "rows.h"
#include "schemas.h"

namespace mmfast {
namespace {

constexpr double kWorkPerElement = 10;

void check(const RowShape& shape, DType dtype, const Tensor& t, int64_t columns, const char* op) {
  require_rows(t.dim() == 3 && dtype_of(t) == dtype, op, "all tensors have one dtype and 3 dims");
  const RowShape other = row_shape(t);
  require_rows(other.n0 == shape.n0 && other.n1 == shape.n1 && other.columns == columns, op,
               "the shapes do not match");
  require_rows(columns <= 1 || t.numel() == 0 || t.strides()[2] == 1, op,
               "the last dim must have stride 1");
}

GluArgs make_args(const Tensor& like, int64_t columns, int64_t activation, const char* op) {
  GluArgs x;
  require_rows(like.dim() == 3, op, "the tensors have 3 dims");
  require_rows(activation >= 0 && activation < kGluActivations, op, "no such activation");
  x.shape = row_shape(like);
  x.shape.columns = columns;
  x.dtype = dtype_of(like);
  x.activation = int(activation);
  return x;
}

RowOperand half(const Tensor& ab, int64_t columns, int which) {
  RowOperand x = row_data(ab);
  x.data = static_cast<char*>(x.data) + which * columns * dtype_bytes(x.dtype);
  return x;
}

void run_fwd(GluArgs& x) {
  if (x.shape.elements() == 0) return;
  x.streamed = past_caches(x.shape, x.dtype, 3);
  RowOperands(x.shape, {&x.a, &x.b, &x.out}).fewest_rows(x.out);
  x.tasks = row_tasks(x.shape);
  const auto run = MMFAST_TABLE(glu).fwd;
  parallel_tasks(x.tasks.count(), double(x.shape.elements()) * kWorkPerElement, 0,
                 [&](int64_t task, void*) { run(x, task); });
}

void run_bwd(GluArgs& x) {
  if (x.shape.elements() == 0) return;
  x.streamed = past_caches(x.shape, x.dtype, 5);
  RowOperands(x.shape, {&x.dout, &x.a, &x.b, &x.da, &x.db}).fewest_rows(x.da);
  x.tasks = row_tasks(x.shape);
  const auto run = MMFAST_TABLE(glu).bwd;
  parallel_tasks(x.tasks.count(), double(x.shape.elements()) * 2 * kWorkPerElement, 0,
                 [&](int64_t task, void*) { run(x, task); });
}

Tensor glu_fwd(Tensor a, Tensor b, int64_t activation) {
  GluArgs x = make_args(a, a.size(2), activation, "glu");
  check(x.shape, x.dtype, a, x.shape.columns, "glu");
  check(x.shape, x.dtype, b, x.shape.columns, "glu");
  Tensor out = empty_rows_like(a);
  x.a = row_data(a), x.b = row_data(b), x.out = row_data(out);
  run_fwd(x);
  return out;
}

std::tuple<Tensor, Tensor> glu_bwd(Tensor dout, Tensor a, Tensor b, int64_t activation) {
  GluArgs x = make_args(a, a.size(2), activation, "glu");
  for (const Tensor* t : {&dout, &a, &b}) check(x.shape, x.dtype, *t, x.shape.columns, "glu");
  Tensor da = empty_rows_like(a), db = empty_rows_like(b);
  x.dout = row_data(dout), x.a = row_data(a), x.b = row_data(b);
  x.da = row_data(da), x.db = row_data(db);
  run_bwd(x);
  return {da, db};
}

Tensor glu_packed_fwd(Tensor ab, int64_t activation) {
  const int64_t columns = ab.size(2) / 2;
  require_rows(ab.size(2) == 2 * columns, "glu_packed", "the last dim must be even");
  GluArgs x = make_args(ab, columns, activation, "glu_packed");
  check(x.shape, x.dtype, ab, 2 * columns, "glu_packed");
  Tensor out = empty_rows(ab, {x.shape.n0, x.shape.n1, columns}, x.dtype);
  x.a = half(ab, columns, 0), x.b = half(ab, columns, 1), x.out = row_data(out);
  run_fwd(x);
  return out;
}

Tensor glu_packed_bwd(Tensor dout, Tensor ab, int64_t activation) {
  const int64_t columns = ab.size(2) / 2;
  require_rows(ab.size(2) == 2 * columns, "glu_packed", "the last dim must be even");
  GluArgs x = make_args(ab, columns, activation, "glu_packed");
  check(x.shape, x.dtype, ab, 2 * columns, "glu_packed");
  check(x.shape, x.dtype, dout, columns, "glu_packed");
  Tensor dab = empty_rows_like(ab);
  x.dout = row_data(dout), x.a = half(ab, columns, 0), x.b = half(ab, columns, 1);
  x.da = half(dab, columns, 0), x.db = half(dab, columns, 1);
  run_bwd(x);
  return dab;
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mmfast, m) {
  m.def(mmfast::schemas::kGluFwd);
  m.def(mmfast::schemas::kGluBwd);
  m.def(mmfast::schemas::kGluPackedFwd);
  m.def(mmfast::schemas::kGluPackedBwd);
}

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("glu_fwd", TORCH_BOX(&mmfast::glu_fwd));
  m.impl("glu_bwd", TORCH_BOX(&mmfast::glu_bwd));
  m.impl("glu_packed_fwd", TORCH_BOX(&mmfast::glu_packed_fwd));
  m.impl("glu_packed_bwd", TORCH_BOX(&mmfast::glu_packed_bwd));
}
