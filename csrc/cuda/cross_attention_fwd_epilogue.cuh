// From a warp's sums to results in memory, or to partial results of a split of the keys.
#pragma once
#include "cross_attention_fwd_softmax.cuh"

namespace mmfast {

// 8 rows of a block's tile, from its row `first` on.
struct RowGroup {
  const BlockPlace& place;
  int first;

  // h: among all heads.
  MMFAST_DEVICE bool find(int i, int32_t& h, int32_t& n) const {
    const bool inside = place.tile.find(first + i, h, n);
    h += place.g * place.tile.heads;
    return inside;
  }
};

// Row (b, h, n) of [B, H, N].
MMFAST_DEVICE int64_t row_number(const AttentionRules& a, int32_t b, int32_t h, int32_t n) {
  return (int64_t(b) * a.H + h) * a.N + n;
}

// Where the LSEs of a split of the keys are, or those of the result.
MMFAST_DEVICE float* place_of_lse(const FwdArgs& args, const BlockPlace& place) {
  const AttentionRules& a = args.a.rules;
  if (args.splits == 1) return args.a.lse;
  return args.part_lse + int64_t(place.part) * a.B * a.H * a.N;
}

// For a tile none of whose rows is there.
template <class F>
MMFAST_DEVICE void clear_lse(const FwdArgs& args, const BlockPlace& place) {
  float* lse = place_of_lse(args, place);
  MMFAST_NO_UNROLL
  for (int i = int(threadIdx.x); i < F::ROWS; i += F::THREADS) {
    int32_t h, n;
    if (!place.tile.find(i, h, n)) continue;
    h += place.g * place.tile.heads;
    store_global(lse + row_number(args.a.rules, place.b, h, n), kMinusInfinity);
  }
}

// Sums become results, bases the LSE in units of log 2. Rows that see nothing are exactly 0 and
// -inf, whatever they hold.
template <class F>
MMFAST_DEVICE void finish_rows(float (&sums)[F::GROUPS][F::WIDTH / 8][4], RowSoftmax<F>& state,
                               const AttentionRules& a, const BlockPlace& place) {
  MMFAST_UNROLL
  for (int i = 0; i < 2 * F::GROUPS; ++i) {
    float &total = state.total[i / 2][i % 2], &base = state.base[i / 2][i % 2];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    int32_t h, n;
    const bool inside = place.tile.find(row_of_lane<F>(i), h, n);
    const bool dead = row_end(a, place.l, inside, n) == 0 || total == 0;
    base = dead ? kMinusInfinity : base + log2_approx(total);
    const float factor = a.keep_scale / total;
    MMFAST_UNROLL
    for (int j = 0; j < F::WIDTH / 8; ++j) {
      MMFAST_UNROLL
      for (int e = 2 * (i % 2); e < 2 * (i % 2) + 2; ++e)
        sums[i / 2][j][e] = dead ? 0.0f : sums[i / 2][j][e] * factor;
    }
  }
}

// Where four neighbours of 8 staged rows lie. Neither the sums' pairs nor rows meet in a bank.
template <int WIDTH>
MMFAST_DEVICE int staged_at(int row, int chunk) {
  return row * WIDTH + (chunk ^ (2 * (row & 3))) * 4;
}

// Multiplies staged rows by the sigmoid of their logits; those that see nothing stay 0, since their
// logits may be anything. lse: of row lane / 4.
template <class F>
MMFAST_DEVICE void apply_gate(const AttentionArgs& a, float* staged, float lse,
                              const RowGroup& rows, int32_t start) {
  MMFAST_NO_UNROLL
  for (int i = lane_id(); i < 8 * F::WIDTH; i += kWarp) {
    const int row = i / F::WIDTH, c = i % F::WIDTH;
    const float own = shuffle(lse, 4 * row);
    int32_t h, n;
    if (!rows.find(row, h, n) || own == kMinusInfinity || c >= a.Dv) continue;
    float* at = staged + staged_at<F::WIDTH>(row, c / 4) + c % 4;
    store_shared(at, load_shared(at) * gate_of(a.gate, rows.place.b, h, start + n, c));
  }
  sync_warp();
}

// Columns [c, c + PER) of a finished row. n as in `row_of`.
template <class F, int PER>
MMFAST_DEVICE void store_piece(const AttentionArgs& a, const float (&x)[PER], int32_t b, int32_t h,
                               int32_t n, int c) {
  using T = typename F::T;
  T* to = row_of<T>(a.out, b, h, n) + c;
  if (!a.out.wide) {
    MMFAST_UNROLL
    for (int e = 0; e < PER; ++e)
      if (c + e < a.Dv) store_global(to + e, from_float<T>(x[e]));
  } else if (c < a.Dv) {
    Vec4 packed;
    MMFAST_UNROLL
    for (int e = 0; e < 4; ++e) {
      if constexpr (sizeof(T) == 2)
        packed.x[e] = pack2<T>(x[2 * e], x[2 * e + 1]);
      else
        packed.x[e] = as_bits(x[e]);
    }
    store_global(reinterpret_cast<Vec4*>(to), packed);
  }
}

// Writes 8 rows: the elements 2 half and 2 half + 1 of a group's sums. They pass through shared
// memory, so that lanes write 16 bytes each. staged: memory of the warp, 8 rows of floats: its tile
// of queries, which nobody needs any more. lse: of row lane / 4, in units of log 2.
template <class F>
MMFAST_DEVICE void store_rows(const FwdArgs& args, const float (&sums)[F::WIDTH / 8][4], int half,
                              float lse, const BlockPlace& place, int first, float* staged) {
  constexpr int PER = 16 / int(sizeof(typename F::T)), PIECES = F::WIDTH / PER;
  const AttentionArgs& a = args.a;
  const int lane = lane_id(), t = lane & 3;
  const RowGroup rows = {place, first};
  const bool split = args.splits > 1;
  const int32_t start = start_of(a.rules.q_starts, place.b);
  const int32_t places = query_places(a.rules, place.l);
  const int64_t skipped = int64_t(place.part) * a.rules.B * a.rules.H * a.rules.N;
  sync_warp();
  MMFAST_UNROLL
  for (int j = 0; j < F::WIDTH / 8; ++j)
    store_shared(reinterpret_cast<Vec2*>(staged + staged_at<F::WIDTH>(lane >> 2, 2 * j + t / 2) +
                                         2 * (t & 1)),
                 Vec2{{as_bits(sums[j][2 * half]), as_bits(sums[j][2 * half + 1])}});
  sync_warp();
  if (!split && a.gate.data != nullptr) apply_gate<F>(a, staged, lse, rows, start);
  int32_t h, n;
  if (rows.find(lane >> 2, h, n) && t == 0) {
    const int64_t row = row_number(a.rules, place.b, h, n);
    store_global(place_of_lse(args, place) + row, split ? lse : lse * kLn2);
  }
  MMFAST_NO_UNROLL
  for (int i = lane; i < 8 * PIECES; i += kWarp) {
    const int row = i / PIECES, c = i % PIECES * PER;
    if (!rows.find(row, h, n)) continue;
    float x[PER];
    MMFAST_UNROLL
    for (int e = 0; e < PER; e += 4) {
      const Vec4 four = load_shared(
          reinterpret_cast<const Vec4*>(staged + staged_at<F::WIDTH>(row, (c + e) / 4)));
      MMFAST_UNROLL
      for (int k = 0; k < 4; ++k) x[e + k] = as_float(four.x[k]);
    }
    if (!split) {
      if (n < places) store_piece<F>(a, x, place.b, h, start + n, c);
      continue;
    }
    float* to = args.parts + (skipped + row_number(a.rules, place.b, h, n)) * args.pitch + c;
    MMFAST_UNROLL
    for (int e = 0; e < PER; e += 4)
      if (c + e < args.pitch)
        store_global(reinterpret_cast<Vec4*>(to + e), Vec4{{as_bits(x[e]), as_bits(x[e + 1]),
                                                            as_bits(x[e + 2]), as_bits(x[e + 3])}});
  }
}

}  // namespace mmfast
