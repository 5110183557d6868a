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

// Row i of a tile, as far as lengths and causality say: `end` is 0 where it is not there.
struct FoundRow {
  int32_t h, n;
  int64_t at;  // among LSEs
  int32_t end;
};

MMFAST_DEVICE FoundRow find_row(const AttentionRules& r, const Lengths& l, const RowTile& tile,
                                int i, int32_t b, int32_t g) {
  int32_t head, n;
  const bool inside = tile.find(i, head, n);
  const int32_t h = g * r.heads + head;
  return {h, n, (int64_t(b) * r.H + h) * r.N + n, row_end(r, l, inside, n)};
}

// What memory says of it. Loads that are begun long before `facts_of_row` needs them.
struct RowLoads {
  float lse = kMinusInfinity, delta = 0;
  int32_t segment = 0;
};

MMFAST_DEVICE RowLoads load_row(const AttentionArgs& a, const FoundRow& f, int32_t b) {
  RowLoads loads;
  if (f.end == 0) return loads;
  loads.lse = load_global(a.lse + f.at);
  if (a.delta != nullptr) loads.delta = load_global(a.delta + f.at);
  if (a.rules.q_segments != nullptr)
    loads.segment = load_global(a.rules.q_segments + int64_t(b) * a.rules.N + f.n);
  return loads;
}

// start: of the item's rows in q and dout.
MMFAST_DEVICE RowFacts facts_of_row(const AttentionArgs& a, const FoundRow& f,
                                    const RowLoads& loads, int32_t b, int32_t start) {
  RowFacts facts;
  if (f.end == 0 || loads.lse == kMinusInfinity) return facts;
  facts.row.end = f.end, facts.row.n = f.n, facts.row.h = f.h, facts.row.segment = loads.segment;
  if (a.rules.mask.data != nullptr) facts.row.mask = pairs_row(a.rules.mask, b, f.h, f.n);
  if (a.rules.bias.data != nullptr) facts.row.bias = pairs_row(a.rules.bias, b, f.h, f.n);
  facts.lse = loads.lse * kLog2e, facts.delta = loads.delta;
  const int64_t n = start + f.n;
  facts.q = int64_t(b) * a.q.sb + int64_t(f.h) * a.q.sh + n * a.q.sn;
  facts.dout = int64_t(b) * a.dout.sb + int64_t(f.h) * a.dout.sh + n * a.dout.sn;
  return facts;
}

// FULL: with segments; PAIRS: with what masks, biases, dropout and gradients of pairs need, where
// lanes do not find it themselves.
template <int ROWS, bool FULL, bool PAIRS>
struct TileRows {
  static constexpr int OFFSETS = PAIRS ? 4 : 2;                       // of 8 bytes
  static constexpr int WORDS = 3 + (FULL ? 1 : 0) + (PAIRS ? 2 : 0);  // of 4 bytes
  int64_t *q, *dout, *mask, *bias;
  float *lse, *delta;
  int32_t *end, *segment, *head, *query;

  static constexpr int64_t bytes(int slots) {
    return shared_bytes<int64_t>(OFFSETS * slots * ROWS) +
           shared_bytes<float>(WORDS * slots * ROWS);
  }

  MMFAST_DEVICE void take(SharedMemory& shared, int slots) {
    const int rows = slots * ROWS;
    q = shared.take<int64_t>(OFFSETS * rows);
    dout = q + rows, mask = dout + rows, bias = mask + rows;
    lse = shared.take<float>(WORDS * rows);
    delta = lse + rows;
    end = reinterpret_cast<int32_t*>(delta + rows);
    segment = end + rows, head = segment + rows, query = head + rows;
  }

  // i counts through all slots.
  MMFAST_DEVICE void put(int i, const RowFacts& f) const {
    store_shared(q + i, f.q), store_shared(dout + i, f.dout);
    store_shared(lse + i, f.lse), store_shared(delta + i, f.delta);
    store_shared(end + i, f.row.end);
    if constexpr (FULL) store_shared(segment + i, f.row.segment);
    if constexpr (PAIRS) {
      store_shared(mask + i, f.row.mask), store_shared(bias + i, f.row.bias);
      store_shared(head + i, f.row.h), store_shared(query + i, f.row.n);
    }
  }

  MMFAST_DEVICE Row row(int i) const {
    Row r;
    r.end = load_shared(end + i);
    if constexpr (FULL) r.segment = load_shared(segment + i);
    if constexpr (PAIRS) {
      r.mask = load_shared(mask + i), r.bias = load_shared(bias + i);
      r.h = load_shared(head + i), r.n = load_shared(query + i);
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
