// The second stage of sums over rows: what blocks left, added in an order that follows from the
// shape alone, and rounded once. Plain C++: what launchers of several ops call.
#pragma once
#include "../common/dtype.h"
#include "stream.h"

namespace mmfast {

constexpr int kColumnSumSlots = 8;

// out[s][g * out_stride[s] + c] = sum over p in [g * group, min((g + 1) * group, chunks)) of
// partials[(s * chunks + p) * columns + c], for every g and every slot s whose out is there.
struct ColumnSumsArgs {
  const float* partials = nullptr;  // [slots, chunks, columns]
  int64_t chunks = 0, columns = 0, group = 0;
  int32_t slots = 0;
  void* out[kColumnSumSlots] = {};  // null: this slot is skipped
  int64_t out_stride[kColumnSumSlots] = {};
  DType out_dtype[kColumnSumSlots] = {};
};

void column_sums(const ColumnSumsArgs&, const Stream&);

}  // namespace mmfast
