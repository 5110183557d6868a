// What the backward's passes know of the rows of a tile, in shared memory.
//
// A row that takes no part (it is past the end, its item is shorter, it sees nothing) has an LSE of
// +inf, so that its weights are 2^-inf = 0, and no place in memory: zeros are read in its stead,
// whatever its query and its gradient hold.
#pragma once
#include "attention_rules.cuh"
#include "device.cuh"

namespace mmfast {

constexpr float kInfinity = __builtin_huge_valf();

struct RowFacts {
  Row row;
  float lse = kInfinity, delta = 0;  // LSE in units of log 2
  int64_t q = -1, dout = -1;         // where its rows begin, in elements
};

MMFAST_DEVICE RowFacts find_row(const AttentionArgs& a, const Lengths& l, const RowTile& tile,
                                int i, int32_t b, int32_t g) {
  RowFacts f;
  int32_t head, n;
  const bool inside = tile.find(i, head, n);
  const int32_t h = g * a.rules.heads + head;
  if (!inside || row_end(a.rules, l, true, n) == 0) return f;
  const int64_t at = (int64_t(b) * a.rules.H + h) * a.rules.N + n;
  const float lse = load_global(a.lse + at);
  if (lse == kMinusInfinity) return f;
  f.row = make_row(a.rules, l, true, b, h, n);
  f.lse = lse * kLog2e;
  if (a.delta != nullptr) f.delta = load_global(a.delta + at);
  f.q = int64_t(b) * a.q.sb + int64_t(h) * a.q.sh + int64_t(n) * a.q.sn;
  f.dout = int64_t(b) * a.dout.sb + int64_t(h) * a.dout.sh + int64_t(n) * a.dout.sn;
  return f;
}

// FULL: with what masks, segments, biases, dropout and gradients of pairs need.
template <int ROWS, bool FULL>
struct TileRows {
  float *lse, *delta;
  int64_t *q, *dout, *mask, *bias;
  int32_t *end, *head, *query, *segment;

  static constexpr int64_t bytes(int slots) {
    const int64_t rows = int64_t(slots) * ROWS;
    return 3 * shared_bytes<float>(rows) + 2 * shared_bytes<int64_t>(rows) +
           (FULL ? 2 * shared_bytes<int64_t>(rows) + 3 * shared_bytes<int32_t>(rows) : 0);
  }

  MMFAST_DEVICE void take(SharedMemory& shared, int slots) {
    const int64_t rows = int64_t(slots) * ROWS;
    lse = shared.take<float>(rows), delta = shared.take<float>(rows);
    end = shared.take<int32_t>(rows);
    q = shared.take<int64_t>(rows), dout = shared.take<int64_t>(rows);
    if constexpr (FULL) {
      mask = shared.take<int64_t>(rows), bias = shared.take<int64_t>(rows);
      head = shared.take<int32_t>(rows), query = shared.take<int32_t>(rows);
      segment = shared.take<int32_t>(rows);
    }
  }

  // i counts through all slots.
  MMFAST_DEVICE void put(int i, const RowFacts& f) const {
    store_shared(lse + i, f.lse), store_shared(delta + i, f.delta);
    store_shared(end + i, f.row.end);
    store_shared(q + i, f.q), store_shared(dout + i, f.dout);
    if constexpr (FULL) {
      store_shared(mask + i, f.row.mask), store_shared(bias + i, f.row.bias);
      store_shared(head + i, f.row.h), store_shared(query + i, f.row.n);
      store_shared(segment + i, f.row.segment);
    }
  }

  MMFAST_DEVICE Row row(int i) const {
    Row r;
    r.end = load_shared(end + i);
    if constexpr (FULL) {
      r.mask = load_shared(mask + i), r.bias = load_shared(bias + i);
      r.h = load_shared(head + i), r.n = load_shared(query + i);
      r.segment = load_shared(segment + i);
    }
    return r;
  }
};

// ---- pairs --------------------------------------------------------------------------------------

// AttentionRules::sparse.
MMFAST_DEVICE bool is_sparse(const AttentionRules& a) {
  return a.mask.data != nullptr || a.kv_segments != nullptr;
}

// The segment of key m < M of item b; 0 where there are none.
MMFAST_DEVICE int32_t key_segment(const AttentionRules& a, int32_t b, int32_t m) {
  return a.kv_segments == nullptr ? 0 : load_global(a.kv_segments + int64_t(b) * a.M + m);
}

// May this row attend to key m < M, whose segment is known?
MMFAST_DEVICE bool may_attend_of(const AttentionRules& a, const Row& r, int32_t m,
                                 int32_t segment) {
  return m < r.end && (a.kv_segments == nullptr || segment_allows(a, r, segment)) &&
         (a.mask.data == nullptr || mask_allows(a, r, m));
}

// What comes in for the weight of a pair: from importance and weights.
template <class T>
MMFAST_DEVICE float gradient_of_pair(const AttentionArgs& a, const Row& r, int32_t b, int32_t m) {
  float x = 0;
  if (a.dimportance != nullptr)
    x = load_global(a.dimportance + (int64_t(b) * a.rules.H + r.h) * a.rules.M + m);
  if (a.dweights.data != nullptr) {
    const float w = to_float(load_global(row_of<T>(a.dweights, b, r.h, r.n) + m));
    x += a.weights_mean ? w / float(a.rules.H) : w;
  }
  return x;
}

}  // namespace mmfast
