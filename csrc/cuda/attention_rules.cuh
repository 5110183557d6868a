// Which rows see which keys, and what is added to a score: lengths, causality, segments, masks,
// bias, dropout, gates. The one place in CUDA where these rules are.
//
// A row is a query n of a head h; the heads that share a key head are taken together, so that few
// queries of many heads still fill a tile.
#pragma once
#include "../common/philox.h"
#include "attention_args.h"
#include "attention_tiles.h"
#include "device.cuh"

namespace mmfast {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr int32_t kGreatest = 0x7fffffff;
constexpr int32_t kLeast = -kGreatest - 1;

// Where one tile of rows lies.
struct RowTile {
  int32_t head = 0, first = 0;  // packed: `first` counts over all heads, and head is 0
  int32_t N = 0, heads = 1;
  bool packed = false;

  // (head among those of the key head, query) of row i; false past the end.
  MMFAST_DEVICE bool find(int i, int32_t& h, int32_t& n) const {
    if (!packed) {
      h = head, n = first + i;
      return n < N;
    }
    const int32_t r = first + i;
    h = r / N, n = r - h * N;
    return h < heads;
  }
};

MMFAST_DEVICE RowTile row_tile(const QueryTiles& tiles, int32_t index, int32_t rows) {
  RowTile t;
  t.N = tiles.N, t.heads = tiles.heads, t.packed = tiles.packed;
  t.head = tiles.packed ? 0 : index / tiles.each;
  t.first = (tiles.packed ? index : index % tiles.each) * rows;
  return t;
}

// The lengths of an item. Negative ones count as 0, too large ones as all.
MMFAST_DEVICE int32_t length(const int32_t* lens, int32_t b, int32_t most) {
  if (lens == nullptr) return most;
  const int32_t given = load_global(lens + b);
  return given < 0 ? 0 : given < most ? given : most;
}

// The first row of item b in tensors whose items begin there: 0 where they are not packed. Loops
// ask anew for each tile: the first-level cache has it, and a register that held it would be one
// too many.
MMFAST_DEVICE int32_t start_of(const int32_t* starts, int32_t b) {
  return starts == nullptr ? 0 : load_global(starts + b);
}

struct Lengths {
  int32_t kv, q, shift;  // row n sees keys m <= n + shift where attention is causal
};

MMFAST_DEVICE Lengths lengths(const AttentionRules& a, int32_t b) {
  const int32_t kv = length(a.kv_lens, b, a.M), q = length(a.q_lens, b, a.N);
  return {kv, q, kv - q};
}

// How many rows of an item results have: packed ones have no padding, what follows is the next
// item's.
MMFAST_DEVICE int32_t query_places(const AttentionRules& a, const Lengths& l) {
  return a.q_starts == nullptr ? a.N : l.q;
}
MMFAST_DEVICE int32_t key_places(const AttentionRules& a, const Lengths& l) {
  return a.kv_starts == nullptr ? a.M : l.kv;
}

// What one row may see by length and causality: keys [0, end); 0 for a row that is not there.
MMFAST_DEVICE int32_t row_end(const AttentionRules& a, const Lengths& l, bool inside, int32_t n) {
  if (!inside || n >= l.q) return 0;
  if (!a.is_causal) return l.kv;
  const int32_t end = n + 1 + l.shift;
  return end < 0 ? 0 : end < l.kv ? end : l.kv;
}

// The keys of a tile of rows: all that any row may see lie in [low, high); every row that is there
// sees all of [low, full) as far as lengths and causality go. low and full are multiples of
// `keys`; high is not rounded. low >= high where there is nothing.
struct KeyRange {
  int32_t low, full, high;
};

// Smallest and greatest n of a tile's rows.
MMFAST_DEVICE void span_of_rows(const RowTile& t, int rows, int32_t& least, int32_t& last) {
  if (!t.packed) {
    least = t.first;
    last = t.first + rows - 1 < t.N - 1 ? t.first + rows - 1 : t.N - 1;
    return;
  }
  const int32_t end = t.first + rows < t.heads * t.N ? t.first + rows : t.heads * t.N;
  const bool one_head = t.first / t.N == (end - 1) / t.N;
  least = one_head ? t.first % t.N : 0;
  last = one_head ? (end - 1) % t.N : t.N - 1;
}

MMFAST_DEVICE KeyRange key_range(const AttentionRules& a, const Lengths& l, const RowTile& t,
                                 int rows, int32_t keys) {
  int32_t least, last;
  span_of_rows(t, rows, least, last);
  if (last >= l.q) last = l.q - 1;
  if (least > last) return {0, 0, 0};
  KeyRange r = {0, l.kv, l.kv};
  if (a.is_causal) {
    r.high = row_end(a, l, true, last);
    r.full = row_end(a, l, true, least);
  }
  r.full = r.full / keys * keys;
  return r;
}

// The other way round: the queries n in [low, high) that may see any of keys [first, first + keys)
// of the item by length and causality, and [full, high) see all of them. `full` is rounded up to a
// multiple of `rows`, `low` down.
MMFAST_DEVICE KeyRange query_range(const AttentionRules& a, const Lengths& l, int32_t first,
                                   int32_t keys, int32_t rows) {
  if (first >= l.kv || l.q <= 0) return {0, 0, 0};
  KeyRange r = {0, 0, l.q};
  if (a.is_causal) {
    const int32_t last = first + keys < l.kv ? first + keys - 1 : l.kv - 1;
    const int32_t low = first - l.shift, full = last - l.shift;
    r.low = (low < 0 ? 0 : low) / rows * rows;
    r.full = full <= 0 ? 0 : int32_t((int64_t(full) + rows - 1) / rows * rows);
  }
  return r;
}

// ---- pairs --------------------------------------------------------------------------------------

// Where row (b, h, n) of a mask or a bias begins, in elements.
MMFAST_DEVICE int64_t pairs_row(const AttentionPairs& p, int32_t b, int32_t h, int32_t n) {
  return int64_t(b) * p.sb + int64_t(h) * p.sh + int64_t(n) * p.sn;
}

MMFAST_DEVICE float load_number(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::F32) return load_global(static_cast<const float*>(data) + i);
  if (dtype == DType::BF16) return to_float(load_global(static_cast<const bf16*>(data) + i));
  return to_float(load_global(static_cast<const f16*>(data) + i));
}

MMFAST_DEVICE void store_number(void* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::F32)
    store_global(static_cast<float*>(data) + i, x);
  else if (dtype == DType::BF16)
    store_global(static_cast<bf16*>(data) + i, from_float<bf16>(x));
  else
    store_global(static_cast<f16*>(data) + i, from_float<f16>(x));
}

// One row of a tile, as its lanes know it.
struct Row {
  int32_t end = 0;  // sees keys [0, end) by length and causality; 0: the row is not there
  int32_t n = 0, h = 0;
  int32_t segment = 0;
  int64_t mask = 0, bias = 0;  // where its row begins
};

MMFAST_DEVICE Row make_row(const AttentionRules& a, const Lengths& l, bool inside, int32_t b,
                           int32_t h, int32_t n) {
  Row r;
  r.end = row_end(a, l, inside, n);
  r.n = n, r.h = h;
  if (r.end > 0 && a.q_segments != nullptr)
    r.segment = load_global(a.q_segments + int64_t(b) * a.N + n);
  if (a.mask.data != nullptr) r.mask = pairs_row(a.mask, b, h, n);
  if (a.bias.data != nullptr) r.bias = pairs_row(a.bias, b, h, n);
  return r;
}

// Does this row see keys of this segment?
MMFAST_DEVICE bool segment_allows(const AttentionRules& a, const Row& r, int32_t segment) {
  return a.segments_at_most ? segment <= r.segment : segment == r.segment;
}

// Does the mask, which is there, let this row see key m?
MMFAST_DEVICE bool mask_allows(const AttentionRules& a, const Row& r, int32_t m) {
  return load_global(static_cast<const uint8_t*>(a.mask.data) + r.mask + int64_t(m) * a.mask.sm) !=
         0;
}

// May this row attend to key m < M of item b?
MMFAST_DEVICE bool may_attend(const AttentionRules& a, const Row& r, int32_t b, int32_t m) {
  if (m >= r.end) return false;
  if (a.kv_segments != nullptr &&
      !segment_allows(a, r, load_global(a.kv_segments + int64_t(b) * a.M + m)))
    return false;
  return a.mask.data == nullptr || mask_allows(a, r, m);
}

// The bias of a pair that may attend, in units of log 2.
MMFAST_DEVICE float bias_of(const AttentionRules& a, const Row& r, int32_t m) {
  return load_number(a.bias.data, a.bias.dtype, r.bias + int64_t(m) * a.bias.sm) * kLog2e;
}

// ---- dropout ------------------------------------------------------------------------------------

// Philox4x32-10 of counter (n, quad, low and high word of b H + h), as everywhere in the library.
MMFAST_DEVICE void random_words(const AttentionRules& a, uint64_t seed, int32_t b, int32_t h,
                                int32_t n, int32_t quad, uint32_t (&words)[4]) {
  const uint64_t row = uint64_t(b) * uint64_t(a.H) + uint64_t(h);
  uint32_t c0 = uint32_t(n), c1 = uint32_t(quad), c2 = uint32_t(row), c3 = uint32_t(row >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  MMFAST_UNROLL
  for (int i = 0; i < kPhiloxRounds; ++i) {
    philox_round(c0, c1, c2, c3, k0, k1);
    k0 += kPhiloxKeyStep0, k1 += kPhiloxKeyStep1;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// What survives of 16 x 8 sums over rows (g, g + 8) and keys m0 + (2t, 2t + 1); m0 is a multiple
// of 8. Bits 0..3 in the order of the sums. Lanes 2i and 2i + 1 need halves of the same two draws:
// each makes one and they exchange.
MMFAST_DEVICE uint32_t survivors_of_rows(const AttentionRules& a, uint64_t seed, int32_t b,
                                         const Row& top, const Row& bottom, int32_t m0) {
  const int lane = lane_id(), t = lane & 3;
  const bool odd = (lane & 1) != 0;
  uint32_t w[4];
  random_words(a, seed, b, odd ? bottom.h : top.h, odd ? bottom.n : top.n, m0 / 4 + (t >> 1), w);
  const uint32_t other0 = shuffle_xor(odd ? w[0] : w[2], 1);
  const uint32_t other1 = shuffle_xor(odd ? w[1] : w[3], 1);
  const uint32_t x[4] = {odd ? other0 : w[0], odd ? other1 : w[1], odd ? w[2] : other0,
                         odd ? w[3] : other1};
  uint32_t bits = 0;
  MMFAST_UNROLL
  for (int i = 0; i < 4; ++i) bits |= uint32_t(x[i] >= a.drop_threshold) << i;
  return bits;
}

// The same of sums whose rows are keys m0 + (g, g + 8) and whose columns are the rows left (2t) and
// right (2t + 1). Four lanes need words of the same four draws (two rows, two quads of keys): each
// makes one, and they exchange.
MMFAST_DEVICE uint32_t survivors_of_keys(const AttentionRules& a, uint64_t seed, int32_t b,
                                         const Row& left, const Row& right, int32_t m0) {
  const int lane = lane_id(), g = lane >> 2, own = g & 3;  // own: bit 0 the row, bit 1 the half
  const bool second = (own & 1) != 0;
  uint32_t w[4];
  random_words(a, seed, b, second ? right.h : left.h, second ? right.n : left.n,
               m0 / 4 + (g >> 2) + (own & 2), w);
  uint32_t x[4];  // x[draw]: the word of this lane's key
  MMFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int wanted = own ^ i;  // by the lane that takes what is offered here
    const uint32_t low = (wanted & 1) != 0 ? w[1] : w[0], high = (wanted & 1) != 0 ? w[3] : w[2];
    const uint32_t got = shuffle_xor((wanted & 2) != 0 ? high : low, i << 2);
    MMFAST_UNROLL
    for (int draw = 0; draw < 4; ++draw)
      if (wanted == draw) x[draw] = got;
  }
  uint32_t bits = 0;
  MMFAST_UNROLL
  for (int i = 0; i < 4; ++i) bits |= uint32_t(x[i] >= a.drop_threshold) << i;
  return bits;
}

// ---- the gate -----------------------------------------------------------------------------------

MMFAST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + device_expf(-x)); }

// sigmoid of the logit of (b, h, n) and channel c. n counts from the first row of a packed gate.
MMFAST_DEVICE float gate_of(const AttentionPairs& gate, int32_t b, int32_t h, int32_t n,
                            int32_t c) {
  return sigmoid(load_number(gate.data, gate.dtype, pairs_row(gate, b, h, n) + c * gate.sm));
}

// ---- where rows lie -----------------------------------------------------------------------------

// n counts from the first row of a packed tensor: the start of its item is in it.
template <class T>
MMFAST_DEVICE T* row_of(const AttentionTensor& x, int32_t b, int32_t h, int32_t n) {
  return static_cast<T*>(x.data) + int64_t(b) * x.sb + int64_t(h) * x.sh + int64_t(n) * x.sn;
}

}  // namespace mmfast
