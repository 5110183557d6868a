// Forward over shared keys and values. A task is a chunk of the rows of a key head and a range of
// its keys; where the keys are cut, a second pass puts the ranges' outputs together.
#pragma once
#include "cross_attention_shared.h"

namespace {

template <class C>
struct SharedFwdScratch {
  using E = typename C::E;
  using Acc = typename C::Acc;
  Row* rows;
  E *q, *q_t, *x, *x_nat;
  Acc *o, *top, *sum, *alpha, *offset, *s, *s_t, *keep;
  uint8_t* seen;
  int64_t bytes;
  SharedFwdScratch(const CrossAttentionArgs& a, void* base) {
    const Widths<C> w(a.D);
    const int64_t most = mmfast::shared_chunk_rows(a);
    const int64_t panel = kTileVectors * lanes<Acc>(),
                  keys = round_up(shared_block_most(shared_block<C>(a)), 32);
    const int64_t filled = round_up(most, lanes<Acc>()) + lanes<Acc>();
    Arena arena{static_cast<char*>(base)};
    rows = arena.take<Row>(most);
    q = arena.take<E>(most * shared_rows_ld<C>(w));
    q_t = arena.take<E>(round_up(most, panel) * w.steps);
    x = arena.take<E>(keys * w.rows_ld);
    x_nat = arena.take<E>(C::PAIR == 1 ? 0 : keys / C::PAIR * w.cols);
    o = arena.take<Acc>(most * w.cols);
    top = arena.take<Acc>(filled);
    sum = arena.take<Acc>(filled);
    alpha = arena.take<Acc>(filled);
    offset = arena.take<Acc>(filled);
    s = arena.take<Acc>(most * kSharedKeys);
    s_t = arena.take<Acc>(kSharedKeys * round_up(most, lanes<Acc>()));
    keep = arena.take<Acc>(kSharedKeys + 64);
    seen = arena.take<uint8_t>(kSharedKeys + 64);
    bytes = arena.used;
  }
};

// The range of keys [begin, end) for all rows of the task; returns whether x.o holds anything.
template <class C, bool PLAIN>
MMFAST_INLINE bool shared_fwd_blocks(const CrossAttentionArgs& a, int64_t b, int64_t g,
                                     int64_t count, int64_t begin, int64_t end,
                                     const SharedRows<C>& q, const SharedFwdScratch<C>& x) {
  using Acc = typename C::Acc;
  const Widths<C> w(a.D);
  const bool check_seen = !PLAIN && has_conditions(a);
  const int64_t blocks = shared_blocks(end - begin, shared_block<C>(a));
  bool touched = false;
  for (int64_t i = 0; i < blocks && begin < end; ++i) {
    const int64_t m0 = begin + mmfast::shared_cut(end - begin, blocks, i);
    const int64_t here = begin + mmfast::shared_cut(end - begin, blocks, i + 1) - m0;
    if (!block_is_live(a, x.rows, count, b, m0, here)) continue;
    const int64_t cols = round_up(here, column_align<Acc>());
    if (check_seen) seen_keys<Acc>(a, x.rows, count, m0, cols, x.seen);
    const ContextBlock<C> c =
        context_block<C>(a, b, g, m0, here, check_seen ? x.seen : nullptr, x.x);
    shared_scores<C>(q, count, c.rows, here, w, x.s, x.s_t);
    softmax_strip<Acc, PLAIN>(a, x.rows, count, x.s, kSharedKeys, m0, cols, x.top, x.sum, x.alpha,
                              x.offset, x.keep);
    const int64_t filled = round_up(c.deep, lanes<Acc>());
    for (int64_t r = 0; r < count; ++r) {
      Acc* s = x.s + r * kSharedKeys;
      for (int64_t j = cols; j < filled; ++j) s[j] = 0;
      probabilities_to_elements<C>(s, filled);
    }
    const Natural<C> values = context_values<C>(c, w, x.x_nat);
    product<C, false>(count, w.cols, c.deep / C::PAIR, reinterpret_cast<const typename C::E*>(x.s),
                      kSharedKeys, values.data, values.layout(), x.o, w.cols,
                      touched ? Start::SCALE_ADD : Start::ZERO, x.alpha);
    touched = true;
  }
  return touched;
}

// A row of what a range of keys gives, [o, top, sum].
template <class Acc>
MMFAST_INLINE Acc* shared_part(const CrossAttentionArgs& a, int64_t chunk, const Row& row) {
  return static_cast<Acc*>(a.out_part) +
         (((chunk * a.B + row.b) * a.H + row.h) * a.N + row.n) * mmfast::shared_part_width(a);
}

template <class C>
MMFAST_NOINLINE void shared_fwd_run(const CrossAttentionArgs& a, int64_t task, void* base) {
  using Acc = typename C::Acc;
  const SharedFwdScratch<C> x(a, base);
  const Widths<C> w(a.D);
  const int64_t range = task % a.key_chunks, row_chunks = mmfast::shared_row_chunks(a);
  const int64_t chunk = task / a.key_chunks % row_chunks, bg = task / a.key_chunks / row_chunks;
  const int64_t b = bg / a.G, g = bg % a.G, group = a.H / a.G;
  const int64_t total = mmfast::shared_rows(a), queries = valid_queries(a, b);
  int64_t count = 0, keys = 0;
  for (int64_t r = chunk * total / row_chunks; r < (chunk + 1) * total / row_chunks; ++r) {
    const int64_t h = g * group + r / a.N, n = r % a.N;
    if (n >= queries) {
      if (range == 0) finish_padded_row<Acc>(a, b, h, n);
      continue;
    }
    x.rows[count] = make_row(a, b, h, n);
    keys = max64(keys, x.rows[count].limit);
    ++count;
  }
  if (count == 0) return;
  const int64_t ld = shared_rows_ld<C>(w);
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = x.rows[r];
    read_elements<C>(a.q.dtype, strided_row<C>(a.q, b, row.h, row.n), x.q + r * ld, w);
    x.top[r] = Acc(-__builtin_inf());
    x.sum[r] = 0;
  }
  for (int64_t r = count; r < round_up(count, lanes<Acc>()); ++r)
    x.top[r] = Acc(-__builtin_inf()), x.sum[r] = 0;
  const SharedRows<C> q = shared_pack_rows<C>({x.q, ld}, count, w, x.q_t);
  const int64_t begin = mmfast::shared_cut(a.M, a.key_chunks, range);
  const int64_t end = min64(mmfast::shared_cut(a.M, a.key_chunks, range + 1), keys);
  const bool touched = plain_scores(a)
                           ? shared_fwd_blocks<C, true>(a, b, g, count, begin, end, q, x)
                           : shared_fwd_blocks<C, false>(a, b, g, count, begin, end, q, x);
  if (a.key_chunks == 1) {
    finish_strip<Acc>(a, x.rows, count, x.o, w.cols, x.top, x.sum);
    return;
  }
  for (int64_t r = 0; r < count; ++r) {
    Acc* part = shared_part<Acc>(a, range, x.rows[r]);
    if (touched) memcpy(part, x.o + r * w.cols, size_t(w.cols) * sizeof(Acc));
    part[w.cols] = x.top[r], part[w.cols + 1] = x.sum[r];
  }
}

template <class C>
int64_t shared_fwd_tasks(const CrossAttentionArgs& a) {
  return a.B * a.G * mmfast::shared_row_chunks(a) * a.key_chunks;
}
template <class C>
int64_t shared_fwd_scratch(const CrossAttentionArgs& a) {
  return SharedFwdScratch<C>(a, nullptr).bytes;
}

// ---- the outputs of several ranges of keys, put together in order -------------------------------

template <class C>
int64_t shared_merge_tasks(const CrossAttentionArgs& a) {
  return a.out_part == nullptr ? 0 : a.B * a.H * ceil_div(a.N, kRowsPerTask);
}
template <class C>
int64_t shared_merge_scratch(const CrossAttentionArgs& a) {
  return (round_up(a.D, lanes<typename C::Acc>()) + 2 * lanes<typename C::Acc>()) *
         int64_t(sizeof(typename C::Acc));
}
template <class C>
MMFAST_NOINLINE void shared_merge_run(const CrossAttentionArgs& a, int64_t task, void* base) {
  using Acc = typename C::Acc;
  constexpr int L = lanes<Acc>();
  const int64_t cols = round_up(a.D, L), blocks = ceil_div(a.N, kRowsPerTask);
  Acc *o = static_cast<Acc*>(base), *top = o + cols, *sum = top + L;
  const int64_t b = task / blocks / a.H, h = task / blocks % a.H, n0 = task % blocks * kRowsPerTask;
  for (int64_t n = n0; n < min64(n0 + kRowsPerTask, valid_queries(a, b)); ++n) {
    const Row row{b, h, n, 0};
    Acc high = Acc(-__builtin_inf()), total = 0;
    for (int64_t c = 0; c < a.key_chunks; ++c) {
      const Acc here = shared_part<Acc>(a, c, row)[cols];
      high = here > high ? here : high;
    }
    memset(o, 0, size_t(cols) * sizeof(Acc));
    for (int64_t c = 0; c < a.key_chunks; ++c) {
      const Acc* part = shared_part<Acc>(a, c, row);
      if (part[cols + 1] == Acc(0)) continue;  // it sees nothing there: no outputs were made
      const Acc base_top = high == Acc(-__builtin_inf()) ? Acc(0) : high;
      const Acc weight = exp2v(splat<Acc>(part[cols] - base_top))[0];
      total += weight * part[cols + 1];
      for (int64_t d = 0; d < cols; d += L) store(o + d, load(o + d) + load(part + d) * weight);
    }
    for (int i = 0; i < L; ++i) top[i] = high, sum[i] = total;
    finish_strip<Acc>(a, &row, 1, o, cols, top, sum);
  }
}

}  // namespace
