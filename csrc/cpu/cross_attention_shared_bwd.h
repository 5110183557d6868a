// Backward over shared keys and values. A task owns a range of keys of one head and reads it once:
//   dP = dO X^T (dropped),  dS = P * (dP - delta),  dX = scale * dS^T Q + P^T dO,  dQ += scale dS X
// dX, the gradient of the keys and of the values, is one product over the rows of Q and dO.
#pragma once
#include "cross_attention_few.h"
#include "cross_attention_shared_fwd.h"

namespace {

// Several chunks of rows are packed for each block anew: that pays for longer blocks.
template <class C>
MMFAST_INLINE int64_t shared_bwd_block(const CrossAttentionArgs& a) {
  return shared_block<C>(a, mmfast::shared_row_chunks(a) > 1 ? 2 : 1);
}

template <class C>
struct SharedBwdScratch {
  using E = typename C::E;
  using Acc = typename C::Acc;
  Row* rows;
  E *q, *q_t, *dout_t, *nat, *x, *x_nat, *pairs;
  Acc *offsets, *delta, *s, *s_t, *dx, *dq, *keep;
  uint8_t *seen, *touched;
  int64_t bytes;
  SharedBwdScratch(const CrossAttentionArgs& a, void* base) {
    const Widths<C> w(a.D);
    const int64_t all = mmfast::shared_rows(a), chunks = mmfast::shared_row_chunks(a);
    const int64_t most = round_up(mmfast::shared_chunk_rows(a), reduce_align<C>());
    const int64_t panel = kTileVectors * lanes<Acc>(),
                  keys = round_up(shared_block_most(shared_bwd_block<C>(a)), 32);
    Arena arena{static_cast<char*>(base)};
    rows = arena.take<Row>(all);
    q = arena.take<E>(2 * most * shared_rows_ld<C>(w));
    q_t = arena.take<E>(round_up(most, panel) * w.steps);
    dout_t = arena.take<E>(round_up(most, panel) * w.steps);
    nat = arena.take<E>(C::PAIR == 1 ? 0 : 2 * most / C::PAIR * w.cols);
    pairs = arena.take<E>(C::PAIR == 1 ? 0 : 2 * most / C::PAIR * kSharedKeys);
    x = arena.take<E>(keys * w.rows_ld);
    x_nat = arena.take<E>(C::PAIR == 1 ? 0 : keys / C::PAIR * w.cols);
    offsets = arena.take<Acc>(all);
    delta = arena.take<Acc>(all);
    s = arena.take<Acc>(2 * most * kSharedKeys);
    s_t = arena.take<Acc>(kSharedKeys * round_up(most, lanes<Acc>()));
    dx = arena.take<Acc>(keys * w.cols);
    dq = arena.take<Acc>(all * w.cols);
    keep = arena.take<Acc>(kSharedKeys + 64);
    seen = arena.take<uint8_t>(kSharedKeys + 64);
    touched = arena.take<uint8_t>(chunks);
    bytes = arena.used;
  }
};

// Rows [begin, begin + count) of the task in every form; queries and gradients lie in one stack.
template <class C>
struct SharedTile {
  int64_t begin, count, padded;
  SharedRows<C> q, dout;
  Natural<C> stack;
};

template <class C>
MMFAST_NOINLINE SharedTile<C> shared_pack_tile(const CrossAttentionArgs& a,
                                               const SharedBwdScratch<C>& x, int64_t begin,
                                               int64_t count) {
  using Acc = typename C::Acc;
  using E = typename C::E;
  const Widths<C> w(a.D);
  const int64_t ld = shared_rows_ld<C>(w);
  SharedTile<C> t{begin, count, round_up(count, reduce_align<C>()), {}, {}, {x.q, ld}};
  E* dout = x.q + count * ld;
  const auto pack = [&](const mmfast::Strided& m, E* to) {
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = x.rows[begin + r];
      // A row that sees nothing may hold anything: it must not reach the sums over rows.
      if (x.offsets[begin + r] == Acc(__builtin_inf()))
        memset(to + r * ld, 0, size_t(w.rows_ld) * sizeof(E));
      else
        read_elements<C>(m.dtype, strided_row<C>(m, row.b, row.h, row.n), to + r * ld, w);
    }
  };
  pack(a.q, x.q);
  t.q = shared_pack_rows<C>({x.q, ld}, count, w, x.q_t);
  if (C::PAIR > 1) t.stack = pack_natural<C>({x.q, ld}, count, t.padded, w, x.nat);
  if (a.dout.data == nullptr) return t;
  pack(a.dout, dout);
  t.dout = shared_pack_rows<C>({dout, ld}, count, w, x.dout_t);
  if (C::PAIR > 1)
    pack_natural<C>({dout, ld}, count, t.padded, w, x.nat + t.padded / C::PAIR * w.cols);
  return t;
}

// P (dropped) and scale * dS of a tile, stacked as the left operand of dX: dS first.
template <class C, bool PLAIN>
MMFAST_INLINE void shared_gradients(const CrossAttentionArgs& a, const SharedBwdScratch<C>& x,
                                    const SharedTile<C>& t, const ContextBlock<C>& c,
                                    int64_t range) {
  using Acc = typename C::Acc;
  constexpr int L = lanes<Acc>();
  const Widths<C> w(a.D);
  Acc *ds = x.s, *p = x.s + t.padded * kSharedKeys;
  shared_scores<C>(t.q, t.count, c.rows, c.here, w, p, x.s_t);
  if (a.dout.data != nullptr)
    shared_scores<C>(t.dout, t.count, c.rows, c.here, w, ds, x.s_t);
  else
    memset(ds, 0, size_t(t.count * kSharedKeys) * sizeof(Acc));
  const int64_t filled = max64(round_up(c.deep, L), c.cols);
  for (int64_t r = 0; r < t.padded; ++r) {
    Acc *s = p + r * kSharedKeys, *d = ds + r * kSharedKeys;
    const int64_t made = r < t.count ? c.cols : 0;
    if (r < t.count) {
      const Row& row = x.rows[t.begin + r];
      gradient_step<Acc, PLAIN>(a, row, s, d, c.m0, c.here, c.cols, x.offsets[t.begin + r],
                                x.delta[t.begin + r], x.keep);
      collect_row<Acc>(a, row, d, c.m0, c.here, c.cols, range);
      for (int64_t i = 0; i < made; i += L) store(d + i, load(d + i) * Acc(a.scale));
    }
    for (int64_t i = made; i < filled; ++i) s[i] = d[i] = 0;
  }
#if defined(__AVX512BF16__)
  if constexpr (C::PAIR == 2) {
    const int64_t rows = a.dout.data != nullptr ? 2 * t.padded : t.padded;
    for (int64_t r = 0; r < rows; r += 2)
      pair_rows(x.s + r * kSharedKeys, x.s + (r + 1) * kSharedKeys, x.pairs + r / 2 * kSharedKeys,
                filled);
  }
#endif
}

// Where the gradient of a block of keys is summed, and how it gets into the result.
template <class Acc>
struct KeyGradients {
  Acc* sums;
  int64_t ld;
  bool direct;  // the sums are the result
  bool stream;  // the result would not stay in the caches: it is written past them
};

template <class C>
MMFAST_INLINE KeyGradients<typename C::Acc> key_gradients(const CrossAttentionArgs& a, int64_t b,
                                                          int64_t g, int64_t m0, bool once,
                                                          typename C::Acc* spare) {
  using Acc = typename C::Acc;
  const Widths<C> w(a.D);
  const bool fits = a.dk.dtype == (sizeof(Acc) == 8 ? DType::F64 : DType::F32) && w.cols == a.D;
  const bool stream = once && fits && can_stream(a.dk, a.B * a.G * a.M, a.D);
  if (fits && !stream && a.dk.data != nullptr)
    return {static_cast<Acc*>(a.dk.data) + a.dk.offset(b, g, m0), a.dk.sn, true, false};
  return {spare, w.cols, false, stream};
}

// Sums of keys [m0, m0 + here) -> the result; zeros for keys that nobody sees.
template <class C>
MMFAST_INLINE void store_shared_keys(const CrossAttentionArgs& a,
                                     const KeyGradients<typename C::Acc>& dx, int64_t b, int64_t g,
                                     int64_t m0, int64_t here, const uint8_t* seen) {
  using Acc = typename C::Acc;
  for (int64_t i = 0; i < here; ++i) {
    char* to = byte_offset(a.dk.data, a.dk.dtype, a.dk.offset(b, g, m0 + i));
    const Acc* from = dx.sums + i * dx.ld;
    if (seen != nullptr && !seen[i]) {
      memset(to, 0, size_t(a.D * mmfast::dtype_bytes(a.dk.dtype)));
    } else if (dx.stream) {
#if defined(__AVX512F__)
      if constexpr (sizeof(Acc) == 4)
        for (int64_t d = 0; d < a.D; d += 16)
          _mm512_stream_ps(reinterpret_cast<float*>(to) + d, (__m512)load(from + d));
#endif
    } else if (!dx.direct) {
      write_row<Acc>(a.dk.dtype, to, from, a.D, Acc(1));
    }
  }
}

// dx (+)= left^T stack, where left is [deep][kSharedKeys].
template <class C>
MMFAST_INLINE void shared_key_gradients(const ContextBlock<C>& c, const SharedTile<C>& t,
                                        int64_t cols, int64_t deep, const typename C::E* left,
                                        const KeyGradients<typename C::Acc>& dx, bool first) {
  product<C, true>(c.here, cols, deep, left, kSharedKeys, t.stack.data, t.stack.layout(), dx.sums,
                   dx.ld, first ? Start::ZERO : Start::ADD, nullptr);
}

// The same where all rows are in one tile: a few keys at a time, in memory order, since the time is
// that of writing them.
template <class C>
MMFAST_INLINE void shared_key_strips(const CrossAttentionArgs& a, int64_t b, int64_t g,
                                     const ContextBlock<C>& c, const SharedTile<C>& t, int64_t cols,
                                     int64_t deep, const typename C::E* left,
                                     const KeyGradients<typename C::Acc>& dx, const uint8_t* seen) {
  constexpr int64_t kStrip = reduce_align<C>() > 2 ? 32 : 2 * kTileRows;
  for (int64_t m = 0; m < c.here; m += kStrip) {
    const int64_t here = min64(kStrip, c.here - m);
    KeyGradients<typename C::Acc> strip = dx;
    if (dx.direct) strip.sums += m * dx.ld;
    product<C, true>(here, cols, deep, left + m, kSharedKeys, t.stack.data, t.stack.layout(),
                     strip.sums, dx.ld, Start::ZERO, nullptr);
    store_shared_keys<C>(a, strip, b, g, c.m0 + m, here, seen == nullptr ? nullptr : seen + m);
  }
}

template <class C, bool PLAIN>
MMFAST_INLINE void shared_bwd_blocks(const CrossAttentionArgs& a, const SharedBwdScratch<C>& x,
                                     int64_t b, int64_t g, int64_t range, int64_t total,
                                     int64_t begin, int64_t end) {
  using Acc = typename C::Acc;
  using E = typename C::E;
  const Widths<C> w(a.D);
  const bool check_seen = !PLAIN && has_conditions(a);
  const int64_t blocks = shared_blocks(end - begin, shared_bwd_block<C>(a));
  const int64_t chunks = max64(ceil_div(total, mmfast::shared_chunk_rows(a)), 1);
  const auto first_row = [&](int64_t chunk) { return chunk * total / chunks; };
  memset(x.touched, 0, size_t(chunks));
  SharedTile<C> t{};
  if (chunks == 1) t = shared_pack_tile<C>(a, x, 0, total);
  for (int64_t j = 0; j < blocks && begin < end; ++j) {
    const int64_t m0 = begin + mmfast::shared_cut(end - begin, blocks, j);
    const int64_t here = begin + mmfast::shared_cut(end - begin, blocks, j + 1) - m0;
    const int64_t cols = round_up(here, column_align<Acc>());
    if (check_seen) seen_keys<Acc>(a, x.rows, total, m0, cols, x.seen);
    const uint8_t* seen = check_seen ? x.seen : nullptr;
    const ContextBlock<C> c = context_block<C>(a, b, g, m0, here, seen, x.x);
    Natural<C> values{};
    const KeyGradients<Acc> dx = key_gradients<C>(a, b, g, m0, chunks == 1, x.dx);
    bool first = true;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t r0 = first_row(i), count = first_row(i + 1) - r0;
      if (!block_is_live(a, x.rows + r0, count, b, m0, here)) continue;
      if (chunks > 1) t = shared_pack_tile<C>(a, x, r0, count);
      shared_gradients<C, PLAIN>(a, x, t, c, range);
      if (values.data == nullptr) values = context_values<C>(c, w, x.x_nat);
      if (a.dk.data != nullptr) {
        const int64_t stacked = a.dout.data != nullptr ? 2 * t.padded : t.padded;
        const E* left = C::PAIR == 1 ? reinterpret_cast<const E*>(x.s) : x.pairs;
        if (chunks == 1)
          shared_key_strips<C>(a, b, g, c, t, w.cols, stacked / C::PAIR, left, dx, seen);
        else
          shared_key_gradients<C>(c, t, w.cols, stacked / C::PAIR, left, dx, first);
        first = false;
      }
      const int64_t filled = max64(round_up(c.deep, lanes<Acc>()), c.cols);
      for (int64_t r = 0; r < count; ++r)
        probabilities_to_elements<C>(x.s + r * kSharedKeys, filled);
      product<C, false>(count, w.cols, c.deep / C::PAIR, reinterpret_cast<const E*>(x.s),
                        kSharedKeys, values.data, values.layout(), x.dq + r0 * w.cols, w.cols,
                        x.touched[i] ? Start::ADD : Start::ZERO, nullptr);
      x.touched[i] = 1;
    }
    if (a.dk.data == nullptr) continue;
    if (first)
      zero_rows(a.dk, b, g, m0, m0 + here, a.D);
    else if (chunks > 1)
      store_shared_keys<C>(a, dx, b, g, m0, here, seen);
  }
  streams_done();
  for (int64_t i = 0; i < chunks; ++i)
    if (!x.touched[i])
      memset(x.dq + first_row(i) * w.cols, 0,
             size_t((first_row(i + 1) - first_row(i)) * w.cols) * sizeof(Acc));
}

template <class C>
MMFAST_NOINLINE void shared_bwd_run(const CrossAttentionArgs& a, int64_t task, void* base) {
  using Acc = typename C::Acc;
  const SharedBwdScratch<C> x(a, base);
  const Widths<C> w(a.D);
  const int64_t range = task % a.key_chunks, bg = task / a.key_chunks;
  const int64_t b = bg / a.G, g = bg % a.G, group = a.H / a.G;
  const int64_t queries = valid_queries(a, b);
  const bool once = dq_written_once(a);
  int64_t total = 0, keys = 0;
  for (int64_t r = 0; r < mmfast::shared_rows(a); ++r) {
    const Row row = make_row(a, b, g * group + r / a.N, r % a.N);
    if (row.n >= queries) {
      if (!once)
        memset(dq_row<Acc>(a, row, range), 0, size_t(a.D) * sizeof(Acc));
      else if (has_query(a, b, row.n))
        memset(dq_storage(a, row), 0, size_t(a.D * mmfast::dtype_bytes(a.dq.dtype)));
      continue;
    }
    x.rows[total] = row;
    x.offsets[total] = exponent_offset<Acc>(a, b, row.h, row.n);
    x.delta[total] = row_delta<C>(a, row);
    keys = max64(keys, row.limit);
    ++total;
  }
  const int64_t begin = mmfast::shared_cut(a.M, a.key_chunks, range);
  const int64_t end = min64(mmfast::shared_cut(a.M, a.key_chunks, range + 1), stored_keys(a, b));
  const int64_t live_end = max64(min64(end, keys), begin);
  zero_rows(a.dk, b, g, live_end, end, a.D);
  if (plain_scores(a))
    shared_bwd_blocks<C, true>(a, x, b, g, range, total, begin, live_end);
  else
    shared_bwd_blocks<C, false>(a, x, b, g, range, total, begin, live_end);
  for (int64_t r = 0; r < total; ++r) {
    const Acc* from = x.dq + r * w.cols;
    if (once)
      write_row<Acc>(a.dq.dtype, dq_storage(a, x.rows[r]), from, a.D, Acc(1));
    else
      memcpy(dq_row<Acc>(a, x.rows[r], range), from, size_t(a.D) * sizeof(Acc));
  }
}

template <class C>
int64_t shared_bwd_tasks(const CrossAttentionArgs& a) {
  return a.B * a.G * a.key_chunks;
}
template <class C>
int64_t shared_bwd_scratch(const CrossAttentionArgs& a) {
  return SharedBwdScratch<C>(a, nullptr).bytes;
}

}  // namespace
