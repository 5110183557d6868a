// Probabilities after the forward, from the log-sum-exp: column sums (importance) and the matrix
// itself (per head, or the mean over heads), tile by tile.
#pragma once
#include "cross_attention_fwd.h"

namespace {

constexpr int64_t kUsualKeys = 128;  // tile of the passes that recompute P ...
constexpr int64_t kTileKeys = 160;   // ... and what there is room for
static_assert(mmfast::kBackwardKeys <= kTileKeys, "what is one block must fit into a tile");
constexpr int64_t kTileQueries = MMFAST_BWD_ROWS;

template <class C>
struct ProbsScratch {
  using E = typename C::E;
  using Acc = typename C::Acc;
  Row* rows;
  E *q, *k_rows, *k;
  Acc *s, *sums, *offsets;
  int64_t bytes;
  ProbsScratch(const CrossAttentionArgs& a, void* base) {
    const Widths<C> wd(a.D);
    const int64_t panel = kTileVectors * lanes<Acc>();
    Arena arena{static_cast<char*>(base)};
    rows = arena.take<Row>(kTileQueries);
    q = arena.take<E>(kTileQueries * wd.rows_ld);
    k_rows = arena.take<E>(kTileKeys * wd.rows_ld);
    k = arena.take<E>(round_up(kTileKeys, panel) * wd.steps);
    s = arena.take<Acc>(kTileQueries * kTileKeys);
    sums = arena.take<Acc>(kTileQueries * kTileKeys);
    offsets = arena.take<Acc>(kTileQueries);
    bytes = arena.used;
  }
};

// lse in units of log2; +inf for a row that sees nothing, so that 2^(s - offset) is 0 there.
template <class Acc>
MMFAST_INLINE Acc exponent_offset(const CrossAttentionArgs& a, int64_t b, int64_t h, int64_t n) {
  const Acc lse = static_cast<const Acc*>(a.lse)[(b * a.H + h) * a.N + n];
  return lse == Acc(-__builtin_inf()) ? Acc(__builtin_inf()) : lse * Acc(kLog2e);
}

template <class C>
MMFAST_INLINE void probs_pack_keys(const CrossAttentionArgs& a, const ProbsScratch<C>& x, int64_t b,
                                   int64_t h, int64_t m0, int64_t here) {
  const Widths<C> wd(a.D);
  const int64_t g = h / (a.H / a.G);
  pack_transposed<C>(rows_of_head<C>(a.k, b, g, m0, here, wd, x.k_rows), here, wd, x.k);
}

// x.s = probabilities of rows n0 .. n0 + count of head h over keys m0 .. m0 + cols.
template <class C>
MMFAST_INLINE void probs_tile(const CrossAttentionArgs& a, const ProbsScratch<C>& x, int64_t b,
                              int64_t h, int64_t n0, int64_t count, int64_t m0, int64_t cols) {
  using Acc = typename C::Acc;
  const Widths<C> wd(a.D);
  const Rows<C> q = rows_of_head<C>(a.q, b, h, n0, count, wd, x.q);
  product<C, false>(count, cols, wd.steps, q.data, q.ld, x.k, transposed_layout(wd), x.s, kTileKeys,
                    Start::ZERO, nullptr);
  const bool plain = plain_scores(a);
  const Acc factor = plain ? Acc(a.scale * kLog2e) : Acc(1);
  for (int64_t r = 0; r < count; ++r) {
    const Row row = make_row(a, b, h, n0 + r);
    Acc* s = x.s + r * kTileKeys;
    if (plain)
      finish_scores<Acc, true>(a, row, s, m0, cols);
    else
      finish_scores<Acc, false>(a, row, s, m0, cols);
    const Acc offset = exponent_offset<Acc>(a, b, h, n0 + r);
    for (int64_t c = 0; c < cols; c += lanes<Acc>())
      store(s + c, exp2v(load(s + c) * factor - splat<Acc>(offset)));
  }
}

// Heads that share their keys are one task: the keys are packed once.
template <class C>
int64_t importance_tasks(const CrossAttentionArgs& a) {
  return a.B * a.G * ceil_div(a.M, kTileKeys);
}
template <class C>
int64_t probs_scratch(const CrossAttentionArgs& a) {
  return ProbsScratch<C>(a, nullptr).bytes;
}

template <class C>
MMFAST_NOINLINE void importance_run(const CrossAttentionArgs& a, int64_t task, void* base) {
  using Acc = typename C::Acc;
  const ProbsScratch<C> x(a, base);
  const int64_t blocks = ceil_div(a.M, kTileKeys);
  const int64_t bg = task / blocks, m0 = task % blocks * kTileKeys;
  const int64_t b = bg / a.G, group = a.H / a.G, h0 = bg % a.G * group;
  const int64_t width = min64(kTileKeys, a.M - m0);
  const int64_t here = max64(min64(valid_keys(a, b) - m0, width), 0);
  const int64_t cols = round_up(here, column_align<Acc>());
  const int64_t queries = valid_queries(a, b);
  if (here > 0) probs_pack_keys<C>(a, x, b, h0, m0, here);
  for (int64_t h = h0; h < h0 + group; ++h) {
    Acc* result = static_cast<Acc*>(a.importance) + (b * a.H + h) * a.M + m0;
    memset(result, 0, size_t(width) * sizeof(Acc));
    if (here == 0) continue;
    memset(x.sums, 0, size_t(cols) * sizeof(Acc));
    for (int64_t n0 = 0; n0 < queries; n0 += kTileQueries) {
      const int64_t count = min64(kTileQueries, queries - n0);
      probs_tile<C>(a, x, b, h, n0, count, m0, cols);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < cols; c += lanes<Acc>())
          store(x.sums + c, load(x.sums + c) + load(x.s + r * kTileKeys + c));
    }
    memcpy(result, x.sums, size_t(here) * sizeof(Acc));
  }
}

template <class C>
int64_t weights_tasks(const CrossAttentionArgs& a) {
  return a.B * (a.weights_mean ? 1 : a.H) * ceil_div(a.N, kTileQueries);
}

template <class C>
MMFAST_NOINLINE void weights_run(const CrossAttentionArgs& a, int64_t task, void* base) {
  using Acc = typename C::Acc;
  const ProbsScratch<C> x(a, base);
  const int64_t blocks = ceil_div(a.N, kTileQueries), sets = a.weights_mean ? 1 : a.H;
  const int64_t n0 = task % blocks * kTileQueries;
  const int64_t b = task / blocks / sets, set = task / blocks % sets;
  const int64_t heads = a.weights_mean ? a.H : 1;
  const int64_t rows = min64(kTileQueries, a.N - n0);
  const int64_t count = max64(min64(valid_queries(a, b) - n0, rows), 0);
  const int64_t keys = count == 0 ? 0 : valid_keys(a, b);
  const int64_t bytes = mmfast::dtype_bytes(a.weights.dtype);
  for (int64_t m0 = 0; m0 < a.M; m0 += kTileKeys) {
    const int64_t width = min64(kTileKeys, a.M - m0);
    const int64_t here = max64(min64(keys - m0, width), 0);
    const int64_t cols = round_up(here, column_align<Acc>());
    memset(x.sums, 0, size_t(rows * kTileKeys) * sizeof(Acc));
    for (int64_t i = 0; i < heads && here > 0; ++i) {
      const int64_t h = a.weights_mean ? i : set;
      if (i == 0 || h % (a.H / a.G) == 0) probs_pack_keys<C>(a, x, b, h, m0, here);
      probs_tile<C>(a, x, b, h, n0, count, m0, cols);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < cols; c += lanes<Acc>())
          store(x.sums + r * kTileKeys + c,
                load(x.sums + r * kTileKeys + c) + load(x.s + r * kTileKeys + c));
    }
    for (int64_t r = 0; r < rows; ++r) {
      char* out = byte_offset(a.weights.data, a.weights.dtype,
                              b * a.weights.sb + set * a.weights.sh + (n0 + r) * a.weights.sn + m0);
      write_row<Acc>(a.weights.dtype, out, x.sums + r * kTileKeys, here, Acc(1) / Acc(heads));
      memset(out + here * bytes, 0, size_t((width - here) * bytes));
    }
  }
}

}  // namespace
