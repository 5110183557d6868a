// The second stage of sums over rows: `column_sums.h`. One instance.
#pragma once
#include "column_sums.h"
#include "compensated_sum.cuh"
#include "device.cuh"

namespace mmfast {

constexpr int kColumnSumWarps = 16;

MMFAST_DEVICE void store_rounded(void* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::F32)
    store_global(static_cast<float*>(data) + i, x);
  else if (dtype == DType::BF16)
    store_global(static_cast<bf16*>(data) + i, from_float<bf16>(x));
  else
    store_global(static_cast<f16*>(data) + i, from_float<f16>(x));
}

// A block sums 32 columns of one slot and group: warp w the partial sums w, w + 16, ..., of which
// neighbouring lanes read neighbouring columns; then warp 0 adds the warps in their order.
MMFAST_KERNEL(32 * kColumnSumWarps, 2) column_sums_kernel(MMFAST_PARAM(ColumnSumsArgs) a) {
  SharedMemory shared;
  float* sums = shared.take<float>(32 * kColumnSumWarps);
  float* losses = shared.take<float>(32 * kColumnSumWarps);
  const int64_t tiles = (a.columns + 31) / 32, groups = (a.chunks + a.group - 1) / a.group;
  const int64_t block = int64_t(blockIdx.x), c = block % tiles * 32 + lane_id();
  const int64_t g = block / tiles % groups;
  const int32_t slot = int32_t(block / tiles / groups);
  if (a.out[slot] == nullptr) return;  // the whole block

  const int64_t first = g * a.group;
  const int64_t last = first + a.group < a.chunks ? first + a.group : a.chunks;
  CompensatedSum mine;
  if (c < a.columns) {
    const float* from = a.partials + int64_t(slot) * a.chunks * a.columns + c;
    for (int64_t p = first + warp_id(); p < last; p += kColumnSumWarps)
      mine.add(load_global(from + p * a.columns));
  }
  store_shared(sums + threadIdx.x, mine.sum);
  store_shared(losses + threadIdx.x, mine.lost);
  sync_threads();
  if (warp_id() != 0 || c >= a.columns) return;
  for (int w = 1; w < kColumnSumWarps; ++w) {
    mine.add(load_shared(sums + w * 32 + lane_id()));
    mine.lost += load_shared(losses + w * 32 + lane_id());
  }
  store_rounded(a.out[slot], a.out_dtype[slot], g * a.out_stride[slot] + c, mine.total());
}

}  // namespace mmfast
