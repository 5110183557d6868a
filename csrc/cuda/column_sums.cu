#include "column_sums.cuh"

#include "launch.cuh"

namespace mmfast {

void column_sums(const ColumnSumsArgs& a, const Stream& stream) {
  if (a.columns == 0 || a.chunks == 0 || a.slots == 0) return;
  const int64_t tiles = (a.columns + 31) / 32, groups = (a.chunks + a.group - 1) / a.group;
  constexpr int64_t kShared = 2 * shared_bytes<float>(32 * kColumnSumWarps);
  launch<column_sums_kernel>({tiles * groups * a.slots, 1, 1}, 32 * kColumnSumWarps, kShared,
                             stream, a);
}

}  // namespace mmfast
