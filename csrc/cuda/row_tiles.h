// How a launch of a row-wise kernel cuts [n0, n1, columns] into blocks. Plain C++17.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "../cpu/rows.h"

namespace mmfast {

constexpr int kRowThreads = 128;
constexpr int kRowThreadsLog2 = 7;
// Accesses of 16 bytes to each tensor that a thread of an elementwise kernel has in flight: at
// 1,536 threads an SM that keeps 48 KiB a tensor on their way, twice an H100's latency at its
// bandwidth.
constexpr int kRowAccesses = 2;

// Blocks of a kernel that sums over rows: one wave on a large GPU. The same number everywhere, so
// that every device adds in the same order.
constexpr int64_t kSumBlocks = 1024;
constexpr int64_t kLeastSumTiles = 4;

// A block takes `rows` rows of an item i0 and 2^columns_log2 vectors of each. Blocks are numbered
// over the tiles of columns, then over those of rows, then over items.
struct RowTiles {
  int32_t columns_log2 = 0;
  uint32_t tiles_n = 0, tiles_c = 0;
  int64_t rows = 0;
  bool wide = false;  // a vector is 16 bytes of the data; otherwise one element
  int64_t blocks(const RowShape& shape) const { return shape.n0 * tiles_n * tiles_c; }
};

// Whether rows of this operand may be accessed in 16 bytes: every one begins at a multiple. The end
// of a row may be shorter. What has one value a row is read as it is.
inline bool wide_access(const RowOperand& x, const RowShape& shape) {
  if (x.data == nullptr || x.sc == 0 || x.per_row) return true;
  const int64_t vector = 16 / dtype_bytes(x.dtype);
  return uintptr_t(x.data) % 16 == 0 && (shape.n0 == 1 || x.s0 % vector == 0) &&
         (shape.n1 == 1 || x.s1 % vector == 0);
}
inline bool wide_access(const RowShape& shape, std::initializer_list<const RowOperand*> operands) {
  return std::all_of(operands.begin(), operands.end(),
                     [&](const RowOperand* x) { return wide_access(*x, shape); });
}

inline int64_t vector_of(DType dtype, bool wide) { return wide ? 16 / dtype_bytes(dtype) : 1; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// log2 of the threads that lie along the columns of a row of so many vectors, 2^most at the most:
// as few lanes idle as can be while neighbours still share whole sectors of memory.
inline int column_threads_log2(int64_t vectors, int most, bool wide) {
  int widest = 0;
  while (widest < most && (int64_t(1) << widest) < vectors) ++widest;
  const auto covered = [&](int log2) { return ceil_div(vectors, int64_t(1) << log2) << log2; };
  int best = widest;
  for (int log2 = widest - 1; log2 >= (wide ? 4 : 6); --log2)
    if (covered(log2) < covered(best)) best = log2;
  return best;
}

// The tiles of an elementwise kernel, of `accesses` vectors a thread.
inline RowTiles element_tiles(const RowShape& shape, DType dtype, bool wide,
                              int accesses_log2 = 1) {
  RowTiles t;
  t.wide = wide;
  const int64_t vectors = ceil_div(shape.columns, vector_of(dtype, wide));
  const int most = kRowThreadsLog2 + accesses_log2;
  t.columns_log2 = column_threads_log2(vectors, most, wide);
  t.rows = int64_t(1) << (most - t.columns_log2);
  t.tiles_n = uint32_t(ceil_div(shape.n1, t.rows));
  t.tiles_c = uint32_t(ceil_div(vectors, int64_t(1) << t.columns_log2));
  return t;
}

// Rows that a block sums where `sums` blocks' worth of sums run over n1 rows, `at_once` of them at
// a time: enough blocks for the whole device, few enough for their partial sums to cost little
// beside the rows themselves.
inline int64_t rows_of_sum(int64_t n1, int64_t sums, int64_t at_once) {
  const int64_t chunks = std::max<int64_t>(1, kSumBlocks / std::max<int64_t>(1, sums));
  return at_once * std::max(kLeastSumTiles, ceil_div(ceil_div(n1, at_once), chunks));
}

// The tiles of a kernel that sums over the rows of an item, column by column.
inline RowTiles sum_tiles(const RowShape& shape, DType dtype, bool wide) {
  RowTiles t;
  t.wide = wide;
  const int64_t vectors = ceil_div(shape.columns, vector_of(dtype, wide));
  t.columns_log2 = column_threads_log2(vectors, kRowThreadsLog2, wide);
  t.tiles_c = uint32_t(ceil_div(vectors, int64_t(1) << t.columns_log2));
  t.rows = rows_of_sum(shape.n1, shape.n0 * t.tiles_c, kRowThreads >> t.columns_log2);
  t.tiles_n = uint32_t(ceil_div(shape.n1, t.rows));
  return t;
}

// The tiles of a kernel in which 2^columns_log2 lanes take a whole row: `least` or more of them.
inline RowTiles team_tiles(const RowShape& shape, DType dtype, bool wide, int least_log2 = 0) {
  RowTiles t;
  t.wide = wide;
  const int64_t vectors = ceil_div(shape.columns, vector_of(dtype, wide));
  // A warp at most, unless rows are few: two vectors a lane keep its loads in flight.
  constexpr int64_t kManyRows = 4096;
  const int most = shape.n0 * shape.n1 < kManyRows ? kRowThreadsLog2 : 5;
  t.columns_log2 = least_log2;
  while (t.columns_log2 < most && (int64_t(2) << t.columns_log2) < vectors) ++t.columns_log2;
  t.rows = kRowThreads >> t.columns_log2;
  t.tiles_n = uint32_t(ceil_div(shape.n1, t.rows));
  t.tiles_c = 1;
  return t;
}

}  // namespace mmfast
