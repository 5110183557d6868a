// Zeros in the rows of packed results that belong to no item: before the first start, past the
// last one, and beyond the longest item that the caller allows. Only the device knows which these
// are, so one small launch a call looks; mostly it finds nothing.
#pragma once
#include <algorithm>

#include "attention_rules.cuh"
#include "launch.cuh"

namespace mmfast {

constexpr int kOutsideThreads = 256;
constexpr int kMostOutside = 4;

// A packed result, [heads, rows, width]; see AttentionRules for the rest.
struct PackedResult {
  AttentionTensor x;
  DType dtype = DType::F32;
  int32_t heads = 0, rows = 0, width = 0;
  const int32_t *starts = nullptr, *lens = nullptr;
  int32_t most = 0;  // rows of an item: N or M
};

struct OutsideArgs {
  PackedResult of[kMostOutside];
  int32_t count = 0, B = 0;
  int32_t blocks = 0;  // of a result

  void add(const PackedResult& result) {
    if (result.starts == nullptr || result.x.data == nullptr) return;
    of[count++] = result;
    blocks = std::max(blocks, (result.rows + kOutsideThreads - 1) / kOutsideThreads);
  }
};

// Whether row r is one of an item. Items that begin where the next one does are empty.
MMFAST_DEVICE bool is_of_an_item(const PackedResult& p, int32_t B, int32_t r) {
  int32_t low = 0, high = B + 1;  // starts before `low` are at most r, from `high` on above it
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (load_global(p.starts + middle) <= r)
      low = middle + 1;
    else
      high = middle;
  }
  const int32_t b = low - 1;
  return b >= 0 && b < B && r - load_global(p.starts + b) < length(p.lens, b, p.most);
}

// A thread looks at a row; the lanes of its warp clear together what is found. A template for the
// one reason that several files may then have it.
template <int THREADS>
MMFAST_KERNEL(THREADS, 4)
cross_attention_outside_kernel(MMFAST_PARAM(OutsideArgs) a) {
  const uint32_t block = uint32_t(blockIdx.x);
  const PackedResult& p = a.of[block / uint32_t(a.blocks)];
  const int32_t first = int32_t(block % uint32_t(a.blocks)) * THREADS + warp_id() * kWarp;
  const int32_t own = first + lane_id();
  const uint32_t found = ballot(own < p.rows && !is_of_an_item(p, a.B, own));
  for (int i = 0; i < kWarp; ++i) {
    if ((found >> i & 1) == 0) continue;
    for (int32_t h = 0; h < p.heads; ++h)
      for (int32_t c = lane_id(); c < p.width; c += kWarp)
        store_number(p.x.data, p.dtype, h * p.x.sh + int64_t(first + i) * p.x.sn + c, 0.0f);
  }
}

inline void clear_outside(OutsideArgs args, const AttentionRules& rules, const Stream& stream) {
  args.B = rules.B;
  const int64_t blocks = int64_t(args.count) * args.blocks;
  if (blocks > 0)
    launch<cross_attention_outside_kernel<kOutsideThreads>>({blocks}, kOutsideThreads, 0, stream,
                                                            args);
}

// What is packed as the queries are, and as the keys are.
inline PackedResult of_queries(const AttentionArgs& a, const AttentionTensor& x, int32_t width) {
  const AttentionRules& r = a.rules;
  return {x, a.dtype, r.H, a.q_rows, width, r.q_starts, r.q_lens, r.N};
}
inline PackedResult of_keys(const AttentionArgs& a, const AttentionTensor& x, int32_t width) {
  const AttentionRules& r = a.rules;
  return {x, a.dtype, r.G, a.kv_rows, width, r.kv_starts, r.kv_lens, r.M};
}
inline PackedResult of_gate(const AttentionArgs& a) {
  const AttentionPairs& x = a.dgate;
  PackedResult p = of_queries(a, {x.data, 0, x.sh, x.sn, false}, x.sm == 0 ? 1 : a.Dv);
  p.dtype = x.dtype;
  return p;
}

}  // namespace mmfast
