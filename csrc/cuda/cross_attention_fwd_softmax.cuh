// The running softmax of a warp's rows, and which pairs of a tile may attend.
#pragma once
#include "cross_attention_fwd_form.cuh"

namespace mmfast {

// What a lane knows of its rows (group, half): row g or g + 8 of each 16. Weights are
// 2^(score - base); `total` is the sum of those that this lane has.
//
// A base is no maximum: it is left as it is until a score exceeds it by more than kSlack, because
// weights up to 2^kSlack are as exact as smaller ones, and scaling the sums costs as much as a
// quarter of a tile's softmax. Where nothing has been seen it is the least number: any score grows
// it, and -inf stays a weight of 0.
template <class F>
struct RowSoftmax {
  float base[F::GROUPS][2], total[F::GROUPS][2];

  MMFAST_DEVICE RowSoftmax() {
    MMFAST_UNROLL
    for (int i = 0; i < 2 * F::GROUPS; ++i)
      base[i / 2][i % 2] = kLeastNumber, total[i / 2][i % 2] = 0;
  }

  static constexpr float kLeastNumber = -3.4028234663852886e38f;
};

constexpr float kSlack = 8;

// Scores become weights. `scale` is greater than 0; sums of rows whose base grows are scaled.
template <class F>
MMFAST_DEVICE void weigh(float (&s)[F::GROUPS][F::KEYS / 8][4],
                         float (&sums)[F::GROUPS][F::WIDTH / 8][4], RowSoftmax<F>& state,
                         float scale) {
  float most[F::GROUPS][2];
  bool exceeds = false;
  MMFAST_UNROLL
  for (int i = 0; i < F::GROUPS; ++i) {
    MMFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      float x = s[i][0][2 * half];
      MMFAST_UNROLL
      for (int j = 0; j < F::KEYS / 8; ++j)
        x = fmaxf(x, fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
      most[i][half] = x * scale;
      exceeds |= most[i][half] > state.base[i][half] + kSlack;
    }
  }
  if (any(exceeds)) {
    MMFAST_UNROLL
    for (int i = 0; i < F::GROUPS; ++i) {
      MMFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        float x = most[i][half];
        x = fmaxf(x, shuffle_xor(x, 1));
        x = fmaxf(x, shuffle_xor(x, 2));
        const float base = state.base[i][half];
        const float grown = x > base + kSlack ? x : base;
        const float shrink = exp2_approx(base - grown);
        state.base[i][half] = grown;
        state.total[i][half] *= shrink;
        MMFAST_UNROLL
        for (int j = 0; j < F::WIDTH / 8; ++j)
          sums[i][j][2 * half] *= shrink, sums[i][j][2 * half + 1] *= shrink;
      }
    }
  }
  MMFAST_UNROLL
  for (int i = 0; i < F::GROUPS; ++i) {
    MMFAST_UNROLL
    for (int j = 0; j < F::KEYS / 8; ++j) {
      MMFAST_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float x = exp2_approx(fmaf(s[i][j][e], scale, -state.base[i][e / 2]));
        state.total[i][e / 2] += x;
        s[i][j][e] = x;
      }
    }
  }
}

// Which of its tile's rows a lane has as row (i / 2, i % 2).
template <class F>
MMFAST_DEVICE int row_of_lane(int i) {
  return warp_id() * F::WARP_ROWS + 8 * i + (lane_id() >> 2);
}

// Scores of keys that lengths and causality hide become -inf. Keys begin at `start`.
template <class F>
MMFAST_DEVICE void cut(float (&s)[F::GROUPS][F::KEYS / 8][4], const AttentionRules& a,
                       const BlockPlace& place, int32_t start) {
  MMFAST_UNROLL
  for (int i = 0; i < 2 * F::GROUPS; ++i) {
    int32_t h, n;
    const bool inside = place.tile.find(row_of_lane<F>(i), h, n);
    const int32_t left = row_end(a, place.l, inside, n) - start - 2 * (lane_id() & 3);
    MMFAST_UNROLL
    for (int j = 0; j < F::KEYS / 8; ++j) {
      MMFAST_UNROLL
      for (int e = 0; e < 2; ++e)
        if (8 * j + e >= left) s[i / 2][j][2 * (i % 2) + e] = kMinusInfinity;
    }
  }
}

// ---- pairs: of one group of rows ----------------------------------------------------------------

// Bit 4 j + e: whether the pair of element e of the j-th 16 x 8 scores may attend.
template <class F>
MMFAST_DEVICE uint32_t allowed_pairs(const AttentionRules& a, const Row (&rows)[2], int32_t b,
                                     int32_t start, int32_t end) {
  static_assert(F::GROUPS == 1 && F::KEYS <= 64, "a bit each");
  const int t = lane_id() & 3;
  uint32_t allowed = 0;
  MMFAST_UNROLL
  for (int j = 0; j < F::KEYS / 8; ++j) {
    MMFAST_UNROLL
    for (int e = 0; e < 4; ++e)
      if (8 * j + 2 * t + (e & 1) < (rows[e / 2].end < end ? rows[e / 2].end : end) - start)
        allowed |= uint32_t(1) << (4 * j + e);
  }
  if (a.kv_segments != nullptr) {
    const int32_t* segments = a.kv_segments + int64_t(b) * a.M + start;
    MMFAST_UNROLL
    for (int j = 0; j < F::KEYS / 8; ++j) {
      MMFAST_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t top = uint32_t(1) << (4 * j + i), bottom = top << 2;
        const int m = 8 * j + 2 * t + i;
        const int32_t segment = allowed & (top | bottom) ? load_global(segments + m) : 0;
        if (!segment_allows(a, rows[0], segment)) allowed &= ~top;
        if (!segment_allows(a, rows[1], segment)) allowed &= ~bottom;
      }
    }
  }
  if (a.mask.data != nullptr) {
    MMFAST_UNROLL
    for (int j = 0; j < F::KEYS / 8; ++j) {
      MMFAST_UNROLL
      for (int e = 0; e < 4; ++e) {
        const uint32_t bit = uint32_t(1) << (4 * j + e);
        if ((allowed & bit) && !mask_allows(a, rows[e / 2], start + 8 * j + 2 * t + (e & 1)))
          allowed &= ~bit;
      }
    }
  }
  return allowed;
}

// Scores in units of log 2, with their bias; -inf where a pair may not attend.
template <class F>
MMFAST_DEVICE void finish_scores(float (&s)[F::KEYS / 8][4], const AttentionRules& a,
                                 const Row (&rows)[2], int32_t start, uint32_t allowed,
                                 float scale) {
  const int t = lane_id() & 3;
  MMFAST_UNROLL
  for (int j = 0; j < F::KEYS / 8; ++j) {
    MMFAST_UNROLL
    for (int e = 0; e < 4; ++e) {
      const bool may = (allowed >> (4 * j + e) & 1) != 0;
      float x = s[j][e] * scale;
      if (a.bias.data != nullptr && may)
        x += bias_of(a, rows[e / 2], start + 8 * j + 2 * t + (e & 1));
      s[j][e] = may ? x : kMinusInfinity;
    }
  }
}

// Weights of dropped pairs become 0.
template <class F>
MMFAST_DEVICE void drop(float (&s)[F::KEYS / 8][4], const AttentionRules& a, uint64_t seed,
                        const Row (&rows)[2], int32_t b, int32_t start) {
  MMFAST_UNROLL
  for (int j = 0; j < F::KEYS / 8; ++j) {
    const uint32_t survive = survivors_of_rows(a, seed, b, rows[0], rows[1], start + 8 * j);
    MMFAST_UNROLL
    for (int e = 0; e < 4; ++e)
      if (!(survive >> e & 1)) s[j][e] = 0;
  }
}

// Bit 2 j + i: whether a row of the warp sees key 2 t + i of the j-th 8.
template <class F>
MMFAST_DEVICE uint32_t seen_keys(uint32_t allowed) {
  uint32_t seen = 0;
  MMFAST_UNROLL
  for (int j = 0; j < F::KEYS / 8; ++j) {
    const uint32_t four = allowed >> (4 * j);
    seen |= ((four | four >> 2) & 3) << (2 * j);
  }
  seen |= shuffle_xor(seen, 4);
  seen |= shuffle_xor(seen, 8);
  return seen | shuffle_xor(seen, 16);
}

// Zeros in place of the values, in B of `load_b_rows`, of keys that no row of the warp sees: 0
// times what is not finite is not 0. `step`: which DEPTH of the tile's keys.
template <class T>
MMFAST_DEVICE void clear_values(typename Operand<T>::B& b, uint32_t seen, int step) {
  MMFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t two = seen >> (2 * (2 * step + i));
      const uint32_t keep = (two & 1 ? 0x0000ffffu : 0u) | (two & 2 ? 0xffff0000u : 0u);
      b.x[i] &= keep, b.x[2 + i] &= keep;
    } else {
      const uint32_t keep = seen >> (2 * step + i) & 1 ? 0xffffffffu : 0u;
      b.big[i] &= keep, b.big[2 + i] &= keep;
      b.small[i] &= keep, b.small[2 + i] &= keep;
    }
  }
}

}  // namespace mmfast
