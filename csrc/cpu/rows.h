// What row-wise ops and their bindings agree on: tensors [n0, n1, columns] as raw pointers with
// strides in elements. Plain C++ for the bindings and for every instruction-set file.
#pragma once
#include <stdint.h>

#include "../common/dtype.h"

namespace mmfast {

// Element (i0, i1, c) at data + i0*s0 + i1*s1 + c*sc. Data has sc = 1; what broadcasts has 0 in its
// broadcast dims. data null = absent.
struct RowOperand {
  void* data = nullptr;
  int64_t s0 = 0, s1 = 0, sc = 1;
  DType dtype = DType::F32;
  bool per_row = false;  // one byte a row, whatever the columns: a row mask
};

struct RowShape {
  int64_t n0 = 0, n1 = 0, columns = 0;
  int64_t rows() const { return n0 * n1; }
  int64_t elements() const { return n0 * n1 * columns; }
};

// How an elementwise op is cut into tasks: rows (i0, i1) in order, a run of them a task, and long
// rows into pieces. It depends on the shape alone, so that no thread count changes a bit.
struct RowTasks {
  int64_t rows_each = 1, columns_each = 1, row_tasks = 0, column_tasks = 0;
  int64_t count() const { return row_tasks * column_tasks; }
};

// Elements of a task: some microseconds of work, and pieces that stay in the first caches.
constexpr int64_t kTaskElements = 16384;

static inline RowTasks row_tasks(const RowShape& shape, int64_t elements = kTaskElements) {
  RowTasks t;
  if (shape.elements() == 0) return t;
  // Pieces are multiples of 256 elements: every piece of an aligned row is aligned.
  t.columns_each = shape.columns < 2 * elements ? shape.columns : elements;
  t.column_tasks = (shape.columns + t.columns_each - 1) / t.columns_each;
  t.rows_each = t.column_tasks > 1 ? 1 : elements / shape.columns;
  if (t.rows_each < 1) t.rows_each = 1;
  t.row_tasks = (shape.rows() + t.rows_each - 1) / t.rows_each;
  return t;
}

}  // namespace mmfast
