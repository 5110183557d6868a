// One row of scores: what it may see, the bias, and the dropout mask.
#pragma once
#include "../common/philox.h"
#include "cross_attention.h"
#include "vec.h"

namespace {

using mmfast::CrossAttentionArgs;
using mmfast::dq_written_once;
using mmfast::DType;
using mmfast::few_rows;
using mmfast::kFewRows;

// A query row inside a task. The key limit joins kv_lens and causality: keys >= limit are unseen.
struct Row {
  int64_t b, h, n;
  int64_t limit;
};

MMFAST_INLINE int64_t valid_keys(const CrossAttentionArgs& a, int64_t b) {
  return a.kv_lens == nullptr ? a.M : min64(max64(a.kv_lens[b], 0), a.M);
}
MMFAST_INLINE int64_t valid_queries(const CrossAttentionArgs& a, int64_t b) {
  return a.q_lens == nullptr ? a.N : min64(max64(a.q_lens[b], 0), a.N);
}
// Rows that there is memory for: a packed tensor has none past an item's length.
MMFAST_INLINE bool has_query(const CrossAttentionArgs& a, int64_t b, int64_t n) {
  return a.q.starts == nullptr || n < valid_queries(a, b);
}
MMFAST_INLINE int64_t stored_keys(const CrossAttentionArgs& a, int64_t b) {
  return a.k.starts == nullptr ? a.M : valid_keys(a, b);
}
MMFAST_INLINE Row make_row(const CrossAttentionArgs& a, int64_t b, int64_t h, int64_t n) {
  const int64_t keys = valid_keys(a, b);
  int64_t limit = keys;
  if (a.is_causal) limit = min64(keys, max64(n + keys - valid_queries(a, b) + 1, 0));
  return Row{b, h, n, limit};
}
MMFAST_INLINE bool has_conditions(const CrossAttentionArgs& a) {
  return a.mask.data != nullptr || a.q_segments != nullptr;
}

// The scores of one tile lie in [rows][ld] at columns m0, m0 + 1, ...; loads of `count` values that
// may end inside a vector go through a zero-filled copy.
template <class Acc, class T>
MMFAST_INLINE Vec<Acc> widen(const T* p, int64_t count) {
  Vec<Acc> v{};
  for (int i = 0; i < lanes<Acc>(); ++i)
    if (i < count) v[i] = Acc(p[i]);
  return v;
}

template <class Acc>
MMFAST_INLINE typename VecOf<Acc>::Mask widen_bytes(const uint8_t* p, int64_t count) {
  constexpr int L = lanes<Acc>();
  typedef uint8_t Bytes __attribute__((vector_size(L)));
  Bytes bytes{};
  memcpy(&bytes, p, size_t(min64(count, L)));
  using Mask = typename VecOf<Acc>::Mask;
  return __builtin_convertvector(bytes, Mask) != 0;
}

template <class Acc>
MMFAST_INLINE typename VecOf<Acc>::Mask widen_ints(const int32_t* p, int64_t count) {
  constexpr int L = lanes<Acc>();
  typedef int32_t Ints __attribute__((vector_size(L * 4)));
  Ints ints{};
  memcpy(&ints, p, size_t(min64(count, L)) * 4);
  using Mask = typename VecOf<Acc>::Mask;
  return __builtin_convertvector(ints, Mask);
}

// All lanes of columns [m, m + L) that the row may see, as a vector mask.
template <class Acc>
MMFAST_INLINE typename VecOf<Acc>::Mask visible(const CrossAttentionArgs& a, const Row& row,
                                                int64_t m) {
  using Int = typename VecOf<Acc>::Int;
  constexpr int L = lanes<Acc>();
  auto ok = (lane_index<Acc>() < Int(min64(row.limit - m, L)));
  const int64_t count = a.M - m;
  if (count <= 0) return ok;
  if (a.mask.data != nullptr) {
    const auto* p = static_cast<const uint8_t*>(a.mask.data) + row.b * a.mask.sb +
                    row.h * a.mask.sh + row.n * a.mask.sn;
    if (a.mask.sm == 0)
      ok &= *p != 0 ? ~typename VecOf<Acc>::Mask{} : typename VecOf<Acc>::Mask{};
    else
      ok &= widen_bytes<Acc>(p + m, count);
  }
  if (a.q_segments != nullptr) {
    const Int mine = a.q_segments[row.b * a.N + row.n];
    const auto theirs = widen_ints<Acc>(a.kv_segments + row.b * a.M + m, count);
    ok &= a.segments_at_most ? (theirs <= mine) : (theirs == mine);
  }
  return ok;
}

template <class Acc>
MMFAST_INLINE Vec<Acc> bias_vector(const CrossAttentionArgs& a, const Row& row, int64_t m) {
  constexpr int L = lanes<Acc>();
  const int64_t base = row.b * a.bias.sb + row.h * a.bias.sh + row.n * a.bias.sn;
  if (a.bias.sm == 0) return splat<Acc>(read_one<Acc>(a.bias.dtype, a.bias.data, base));
  Vec<Acc> v{};
  WithStore<Acc>::call(a.bias.dtype, [&](auto s) {
    using S = decltype(s);
    const auto* p = static_cast<const typename S::Bits*>(a.bias.data) + base + m;
    if (a.M - m >= L) {
      v = S::loadv(p);
    } else {
      for (int i = 0; i < a.M - m; ++i) v[i] = S::get(p + i);
    }
  });
  return v;
}

// Whether exp2(S * c - offset) may be taken straight from the product: nothing to add, and only a
// tail to cut. `c` is scale * log2(e) then; otherwise the row is rewritten and c is 1.
MMFAST_INLINE bool plain_scores(const CrossAttentionArgs& a) {
  return a.bias.data == nullptr && !has_conditions(a) && a.scale > 0;
}

template <class Acc>
MMFAST_INLINE Vec<Acc> minus_infinity() {
  return splat<Acc>(Acc(-__builtin_inf()));
}

// Rewrites the scores of a row in units of log2, -inf where unseen. With PLAIN only the columns
// from the limit on are touched.
template <class Acc, bool PLAIN>
MMFAST_INLINE void finish_scores(const CrossAttentionArgs& a, const Row& row, Acc* s, int64_t m0,
                                 int64_t cols) {
  constexpr int L = lanes<Acc>();
  using Int = typename VecOf<Acc>::Int;
  if constexpr (PLAIN) {
    const int64_t full = min64(max64(row.limit - m0, 0), cols);
    for (int64_t c = full / L * L; c < cols; c += L) {
      const auto ok = lane_index<Acc>() < Int(min64(max64(full - c, 0), L));
      store(s + c, ok ? load(s + c) : minus_infinity<Acc>());
    }
  } else {
    const Acc factor = Acc(a.scale * kLog2e);
    for (int64_t c = 0; c < cols; c += L) {
      Vec<Acc> v = load(s + c) * factor;
      if (a.bias.data != nullptr && m0 + c < a.M)
        v += bias_vector<Acc>(a, row, m0 + c) * Acc(kLog2e);
      store(s + c, visible<Acc>(a, row, m0 + c) ? v : minus_infinity<Acc>());
    }
  }
}

// keep[c] = 1 / (1 - p) where (row, m0 + c) is kept, else 0. m0 and cols are multiples of 4.
template <class Acc>
MMFAST_NOINLINE void dropout_factors(const CrossAttentionArgs& a, const Row& row, int64_t m0,
                                     int64_t cols, Acc* keep) {
  constexpr int W = 16;
  const uint64_t seed = uint64_t(*a.seed);
  const uint64_t bh = uint64_t(row.b) * uint64_t(a.H) + uint64_t(row.h);
  const Acc kept = Acc(a.keep_scale);
  for (int64_t c = 0; c < cols; c += 4 * W) {
    uint32_t c0[W], c1[W], c2[W], c3[W];
    for (int i = 0; i < W; ++i) {
      c0[i] = uint32_t(row.n);
      c1[i] = uint32_t((m0 + c) / 4 + i);
      c2[i] = uint32_t(bh);
      c3[i] = uint32_t(bh >> 32);
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < mmfast::kPhiloxRounds; ++round) {
      for (int i = 0; i < W; ++i) mmfast::philox_round(c0[i], c1[i], c2[i], c3[i], k0, k1);
      k0 += mmfast::kPhiloxKeyStep0;
      k1 += mmfast::kPhiloxKeyStep1;
    }
    const int64_t groups = min64(W, (cols - c) / 4);
    for (int64_t i = 0; i < groups; ++i) {
      keep[c + 4 * i] = c0[i] >= a.drop_threshold ? kept : Acc(0);
      keep[c + 4 * i + 1] = c1[i] >= a.drop_threshold ? kept : Acc(0);
      keep[c + 4 * i + 2] = c2[i] >= a.drop_threshold ? kept : Acc(0);
      keep[c + 4 * i + 3] = c3[i] >= a.drop_threshold ? kept : Acc(0);
    }
  }
}

// seen[j] |= row may see key m0 + j. Only for conditions beyond the key limit.
template <class Acc>
MMFAST_INLINE void accumulate_seen(const CrossAttentionArgs& a, const Row& row, int64_t m0,
                                   int64_t cols, uint8_t* seen) {
  constexpr int L = lanes<Acc>();
  for (int64_t c = 0; c < cols; c += L) {
    const auto ok = visible<Acc>(a, row, m0 + c);
    for (int i = 0; i < L; ++i) seen[c + i] |= uint8_t(ok[i] & 1);
  }
}

// Least and greatest segment of count entries.
struct SegmentRange {
  int32_t low = INT32_MAX, high = INT32_MIN;
  void add(int32_t s) {
    low = s < low ? s : low;
    high = s > high ? s : high;
  }
};
MMFAST_INLINE bool segments_meet(const CrossAttentionArgs& a, const SegmentRange& q,
                                 const SegmentRange& kv) {
  if (a.segments_at_most) return kv.low <= q.high;
  return kv.low <= q.high && q.low <= kv.high;
}

}  // namespace
