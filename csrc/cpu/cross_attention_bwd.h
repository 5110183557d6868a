// Backward of cross_attention. One task owns a range of the keys of one key/value head: it makes
// their dk and dv whole, and one addend of dq (the addends of several ranges are summed in order
// afterwards). P is recomputed from the log-sum-exp, tile by tile:
//   dP = dO V^T (dropped as in the forward) + dimportance + dweights,  dS = P * (dP - delta)
//   dV += P^T dO,  dK += scale * dS^T Q,  dQ += scale * dS K
#pragma once
#include "cross_attention_probs.h"

namespace {

template <class C>
struct BwdScratch {
  using E = typename C::E;
  using Acc = typename C::Acc;
  Row* rows;
  E *q, *q_nat, *dout, *dout_nat, *k, *k_nat, *k_t, *v, *v_t, *p_t, *ds_t;  // packed here
  Acc *s, *dp, *dk, *dv, *dq, *keep, *offsets, *delta, *dbias;
  uint8_t* seen;
  int64_t bytes;
  BwdScratch(const CrossAttentionArgs& a, void* base) {
    const Widths<C> wd(a.D), wv(a.Dv);
    const int64_t panel = kTileVectors * lanes<Acc>();
    Arena arena{static_cast<char*>(base)};
    rows = arena.take<Row>(kTileQueries);
    q = arena.take<E>(kTileQueries * wd.rows_ld);
    dout = arena.take<E>(kTileQueries * wv.rows_ld);
    k = arena.take<E>(kTileKeys * wd.rows_ld);
    v = arena.take<E>(kTileKeys * wv.rows_ld);
    k_t = arena.take<E>(round_up(kTileKeys, panel) * wd.steps);
    v_t = arena.take<E>(round_up(kTileKeys, panel) * wv.steps);
    s = arena.take<Acc>(kTileQueries * kTileKeys);
    dp = arena.take<Acc>(kTileQueries * kTileKeys);
    q_nat = dout_nat = k_nat = nullptr;
    p_t = reinterpret_cast<E*>(s), ds_t = reinterpret_cast<E*>(dp);
    if (C::PAIR > 1) {
      q_nat = arena.take<E>(kTileQueries / C::PAIR * wd.cols);
      dout_nat = arena.take<E>(kTileQueries / C::PAIR * wv.cols);
      k_nat = arena.take<E>(kTileKeys / C::PAIR * wd.cols);
      p_t = arena.take<E>(kTileQueries / C::PAIR * kTileKeys);
      ds_t = arena.take<E>(kTileQueries / C::PAIR * kTileKeys);
    }
    dk = arena.take<Acc>(kTileKeys * wd.cols);
    dv = arena.take<Acc>(kTileKeys * wv.cols);
    dq = arena.take<Acc>(kTileQueries * wd.cols);
    keep = arena.take<Acc>(kTileKeys);
    offsets = arena.take<Acc>(kTileQueries);
    delta = arena.take<Acc>(kTileQueries);
    seen = arena.take<uint8_t>(kTileKeys + 64);
    dbias = arena.take<Acc>(a.dbias_mode == 3 ? kTileQueries * kTileKeys : 0);
    bytes = arena.used;
  }
};

// The block of keys a task is at.
struct KeyBlock {
  int64_t b, g, m0, here, cols, deep;
  bool only;  // no other block adds to dq: its rows are written once, in storage
};

template <class C>
MMFAST_INLINE KeyBlock key_block(int64_t b, int64_t g, int64_t m0, int64_t end) {
  const int64_t here = end - m0;
  return {b,
          g,
          m0,
          here,
          round_up(here, column_align<typename C::Acc>()),
          round_up(here, reduce_align<C>()),
          false};
}

// The natural form of the keys, for dQ = dS K; the transposed forms go to x.k_t and x.v_t.
template <class C>
MMFAST_INLINE Natural<C> bwd_pack_keys(const CrossAttentionArgs& a, const BwdScratch<C>& x,
                                       const KeyBlock& kb, bool check_seen) {
  const Widths<C> wd(a.D), wv(a.Dv);
  const auto rows_of = [&](const mmfast::Strided& t, const Widths<C>& w, typename C::E* spare,
                           int64_t padded, bool read_once) -> Rows<C> {
    if (!check_seen && padded == kb.here && (read_once || rows_adjoin<C>(t, w)))
      return rows_of_head<C>(t, kb.b, kb.g, kb.m0, kb.here, w, spare);
    return pack_rows<C>(kb.here, padded, w, t.dtype, spare, [&](int64_t i) -> const void* {
      return check_seen && !x.seen[i] ? nullptr : strided_row<C>(t, kb.b, kb.g, kb.m0 + i);
    });
  };
  const Rows<C> k = rows_of(a.k, wd, x.k, C::PAIR == 1 ? kb.deep : kb.here, C::PAIR == 2);
  pack_transposed<C>(k, kb.here, wd, x.k_t);
  if (a.dout.data != nullptr)
    pack_transposed<C>(rows_of(a.v, wv, x.v, kb.here, true), kb.here, wv, x.v_t);
  return pack_natural<C>(k, kb.here, kb.deep, wd, x.k_nat);
}

template <class Acc>
MMFAST_INLINE Acc row_dot(DType dtype, const void* x, const void* y, int64_t width) {
  constexpr int L = lanes<Acc>();
  Acc result = 0;
  WithStore<Acc>::call(dtype, [&](auto s) {
    using S = decltype(s);
    const auto *p = static_cast<const typename S::Bits*>(x),
               *q = static_cast<const typename S::Bits*>(y);
    Vec<Acc> sum{};
    int64_t d = 0;
    for (; d + L <= width; d += L) sum += S::loadv(p + d) * S::loadv(q + d);
    result = reduce_add<Acc>(sum);
    for (; d < width; ++d) result += S::get(p + d) * S::get(q + d);
  });
  return result;
}

// delta = rowsum(dout * out) - dlse of a row: made before where there is a gate, else here. It
// costs a hundredth of what a tile does with the row, and saves a pass over memory.
template <class C>
MMFAST_INLINE typename C::Acc row_delta(const CrossAttentionArgs& a, const Row& row) {
  using Acc = typename C::Acc;
  const int64_t at = (row.b * a.H + row.h) * a.N + row.n;
  if (a.delta != nullptr) return static_cast<const Acc*>(a.delta)[at];
  if (a.dout.data == nullptr) return Acc(0);
  const Acc dot = row_dot<Acc>(a.out.dtype, strided_row<C>(a.dout, row.b, row.h, row.n),
                               strided_row<C>(a.out, row.b, row.h, row.n), a.Dv);
  return a.dlse == nullptr ? dot : dot - static_cast<const Acc*>(a.dlse)[at];
}

// Query rows of a tile in the forms that the products take.
template <class C>
struct TileRows {
  Rows<C> q, dout;
  Natural<C> q_nat, dout_nat;
  int64_t count, padded;
};

// Rows x.rows[0 .. count), padded with rows of zeros to whole elements of the reduced dim.
template <class C>
MMFAST_INLINE TileRows<C> bwd_pack_rows(const CrossAttentionArgs& a, const BwdScratch<C>& x,
                                        int64_t count) {
  using Acc = typename C::Acc;
  const Widths<C> wd(a.D), wv(a.Dv);
  TileRows<C> t{};
  t.count = count;
  t.padded = round_up(count, reduce_align<C>());
  bool blind = false;
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = x.rows[r];
    x.offsets[r] = exponent_offset<Acc>(a, row.b, row.h, row.n);
    blind |= x.offsets[r] == Acc(__builtin_inf());
    x.delta[r] = row_delta<C>(a, row);
  }
  const bool one_head = x.rows[0].h == x.rows[count - 1].h;
  const auto rows_of = [&](const mmfast::Strided& m, const Widths<C>& w, typename C::E* spare) {
    const int64_t padded = C::PAIR == 1 ? t.padded : count;
    if (one_head && !blind && padded == count && (C::PAIR == 2 || rows_adjoin<C>(m, w)))
      return rows_of_head<C>(m, x.rows[0].b, x.rows[0].h, x.rows[0].n, count, w, spare);
    return pack_rows<C>(count, padded, w, m.dtype, spare, [&](int64_t i) -> const void* {
      // A row that sees nothing may hold anything: it must not reach the sums over rows.
      if (x.offsets[i] == Acc(__builtin_inf())) return nullptr;
      return strided_row<C>(m, x.rows[i].b, x.rows[i].h, x.rows[i].n);
    });
  };
  t.q = rows_of(a.q, wd, x.q);
  t.q_nat = pack_natural<C>(t.q, count, t.padded, wd, x.q_nat);
  if (a.dout.data == nullptr) return t;
  t.dout = rows_of(a.dout, wv, x.dout);
  t.dout_nat = pack_natural<C>(t.dout, count, t.padded, wv, x.dout_nat);
  return t;
}

// Adds what the loss says of P itself: dimportance[m] + dweights[n, m].
template <class Acc>
MMFAST_NOINLINE void add_direct_gradient(const CrossAttentionArgs& a, const Row& row, Acc* dp,
                                         int64_t m0, int64_t here) {
  if (a.dimportance != nullptr) {
    const Acc* p = static_cast<const Acc*>(a.dimportance) + (row.b * a.H + row.h) * a.M + m0;
    for (int64_t c = 0; c < here; ++c) dp[c] += p[c];
  }
  if (a.dweights.data != nullptr) {
    const Acc share = a.weights_mean ? Acc(1) / Acc(a.H) : Acc(1);
    const int64_t at =
        row.b * a.dweights.sb + row.h * a.dweights.sh + row.n * a.dweights.sn + m0 * a.dweights.sm;
    for (int64_t c = 0; c < here; ++c)
      dp[c] += share * read_one<Acc>(a.dweights.dtype, a.dweights.data, at + c * a.dweights.sm);
  }
}

// Scores and dP of one row -> P (dropped) in s and dS (not yet scaled) in dp.
template <class Acc, bool PLAIN>
MMFAST_INLINE void gradient_step(const CrossAttentionArgs& a, const Row& row, Acc* s, Acc* dp,
                                 int64_t m0, int64_t here, int64_t cols, Acc offset, Acc delta,
                                 Acc* keep) {
  constexpr int L = lanes<Acc>();
  finish_scores<Acc, PLAIN>(a, row, s, m0, cols);
  const Acc factor = PLAIN ? Acc(a.scale * kLog2e) : Acc(1);
  const bool dropout = a.seed != nullptr;
  if (dropout) {
    dropout_factors<Acc>(a, row, m0, cols, keep);
    for (int64_t c = 0; c < cols; c += L) store(dp + c, load(dp + c) * load(keep + c));
  }
  if (a.dimportance != nullptr || a.dweights.data != nullptr)
    add_direct_gradient<Acc>(a, row, dp, m0, here);
  for (int64_t c = 0; c < cols; c += L) {
    const Vec<Acc> p = exp2v(load(s + c) * factor - splat<Acc>(offset));
    // Where P is 0 the gradient is 0, whatever stands in dP.
    const Vec<Acc> ds = p * (load(dp + c) - splat<Acc>(delta));
    store(dp + c, p != Acc(0) ? ds : Vec<Acc>{});
    store(s + c, dropout ? p * load(keep + c) : p);
  }
}

// The gradient of the bias out of one row of dS, in the modes that this pass serves.
template <class Acc>
MMFAST_NOINLINE void collect_dbias(const CrossAttentionArgs& a, const Row& row, const Acc* ds,
                                   int64_t m0, int64_t here, int64_t chunk) {
  if (a.dbias_mode == 1) {
    const int64_t at = row.b * a.dbias.sb + row.h * a.dbias.sh + row.n * a.dbias.sn + m0;
    write_row<Acc>(a.dbias.dtype, byte_offset(a.dbias.data, a.dbias.dtype, at), ds, here, Acc(1));
  } else if (a.dbias_has_m) {
    Acc* part = static_cast<Acc*>(a.dbias_part) + (row.b * a.H + row.h) * a.M + m0;
    for (int64_t c = 0; c < here; ++c) part[c] += ds[c];
  } else {
    Acc sum = 0;
    for (int64_t c = 0; c < here; ++c) sum += ds[c];
    static_cast<Acc*>(a.dbias_part)[((chunk * a.B + row.b) * a.H + row.h) * a.N + row.n] += sum;
  }
}

// What a row of dS gives besides dq and dk: its share of dbias, and the gradient of its lse.
template <class Acc>
MMFAST_INLINE void collect_row(const CrossAttentionArgs& a, const Row& row, const Acc* ds,
                               int64_t m0, int64_t here, int64_t cols, int64_t chunk) {
  if (a.dbias_mode == 1 || a.dbias_mode == 2) collect_dbias<Acc>(a, row, ds, m0, here, chunk);
  if (a.dlse_out == nullptr) return;
  Vec<Acc> sum{};
  for (int64_t c = 0; c < cols; c += lanes<Acc>()) sum += load(ds + c);
  static_cast<Acc*>(a.dlse_out)[((chunk * a.B + row.b) * a.H + row.h) * a.N + row.n] -=
      reduce_add<Acc>(sum);
}

template <class C, bool PLAIN>
MMFAST_INLINE void bwd_tile(const CrossAttentionArgs& a, const BwdScratch<C>& x, const KeyBlock& kb,
                            const TileRows<C>& t) {
  using Acc = typename C::Acc;
  const Widths<C> wd(a.D), wv(a.Dv);
  const int64_t count = t.count;
  product<C, false>(count, kb.cols, wd.steps, t.q.data, t.q.ld, x.k_t, transposed_layout(wd), x.s,
                    kTileKeys, Start::ZERO, nullptr);
  if (a.dout.data != nullptr)
    product<C, false>(count, kb.cols, wv.steps, t.dout.data, t.dout.ld, x.v_t,
                      transposed_layout(wv), x.dp, kTileKeys, Start::ZERO, nullptr);
  else
    memset(x.dp, 0, size_t(count * kTileKeys) * sizeof(Acc));
  for (int64_t r = 0; r < count; ++r)
    gradient_step<Acc, PLAIN>(a, x.rows[r], x.s + r * kTileKeys, x.dp + r * kTileKeys, kb.m0,
                              kb.here, kb.cols, x.offsets[r], x.delta[r], x.keep);
}

MMFAST_INLINE char* dq_storage(const CrossAttentionArgs& a, const Row& row) {
  return byte_offset(a.dq.data, a.dq.dtype, a.dq.offset(row.b, row.h, row.n));
}
template <class Acc>
MMFAST_INLINE Acc* dq_row(const CrossAttentionArgs& a, const Row& row, int64_t chunk) {
  if (a.dq_acc == nullptr) return static_cast<Acc*>(a.dq.data) + a.dq.offset(row.b, row.h, row.n);
  return static_cast<Acc*>(a.dq_acc) + (((chunk * a.B + row.b) * a.H + row.h) * a.N + row.n) * a.D;
}

// From P and dS of a tile: dv, dk and dq.
template <class C>
MMFAST_INLINE void bwd_products(const CrossAttentionArgs& a, const BwdScratch<C>& x,
                                const KeyBlock& kb, const Natural<C>& k, const TileRows<C>& t,
                                int64_t chunk, bool first) {
  using Acc = typename C::Acc;
  using E = typename C::E;
  constexpr int L = lanes<Acc>();
  const Widths<C> wd(a.D), wv(a.Dv);
  const int64_t count = t.count, padded = t.padded;
  const int64_t filled = round_up(kb.deep, L);
  const Start start = first ? Start::ZERO : Start::ADD;
  for (int64_t r = 0; r < padded; ++r) {
    Acc *s = x.s + r * kTileKeys, *dp = x.dp + r * kTileKeys;
    const int64_t made = r < count ? kb.cols : 0;
    for (int64_t c = 0; c < made; c += L) store(dp + c, load(dp + c) * Acc(a.scale));
    for (int64_t c = made; c < max64(filled, kb.cols); ++c) s[c] = dp[c] = 0;
  }
#if defined(__AVX512BF16__)
  if constexpr (C::PAIR == 2) {
    for (int64_t r = 0; r < padded; r += 2) {
      pair_rows(x.s + r * kTileKeys, x.s + (r + 1) * kTileKeys, x.p_t + r / 2 * kTileKeys, filled);
      pair_rows(x.dp + r * kTileKeys, x.dp + (r + 1) * kTileKeys, x.ds_t + r / 2 * kTileKeys,
                filled);
    }
  }
#endif
  if (a.dout.data != nullptr)
    product<C, true>(kb.here, wv.cols, padded / C::PAIR, x.p_t, kTileKeys, t.dout_nat.data,
                     t.dout_nat.layout(), x.dv, wv.cols, start, nullptr);
  product<C, true>(kb.here, wd.cols, padded / C::PAIR, x.ds_t, kTileKeys, t.q_nat.data,
                   t.q_nat.layout(), x.dk, wd.cols, start, nullptr);
  for (int64_t r = 0; r < count; ++r) probabilities_to_elements<C>(x.dp + r * kTileKeys, filled);
  product<C, false>(count, wd.cols, kb.deep / C::PAIR, reinterpret_cast<const E*>(x.dp), kTileKeys,
                    k.data, k.layout(), x.dq, wd.cols, Start::ZERO, nullptr);
  for (int64_t r = 0; r < count; ++r) {
    const Acc* from = x.dq + r * wd.cols;
    if (kb.only) {
      write_row<Acc>(a.dq.dtype, dq_storage(a, x.rows[r]), from, a.D, Acc(1));
      continue;
    }
    Acc* to = dq_row<Acc>(a, x.rows[r], chunk);
    int64_t d = 0;
    for (; d + L <= a.D; d += L) store(to + d, load(to + d) + load(from + d));
    for (; d < a.D; ++d) to[d] += from[d];
  }
}

// Fills x.rows with rows [r0, r0 + kTileQueries) of the group; returns whether any of them may see
// a key of the block.
template <class C>
MMFAST_INLINE bool bwd_rows_of(const CrossAttentionArgs& a, const BwdScratch<C>& x,
                               const KeyBlock& kb, const SegmentRange& kv_range, int64_t queries,
                               int64_t r0, int64_t count) {
  const int64_t group = a.H / a.G;
  bool live = false;
  SegmentRange q_range;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t n = (r0 + r) % queries;
    x.rows[r] = make_row(a, kb.b, kb.g * group + (r0 + r) / queries, n);
    live |= x.rows[r].limit > kb.m0;
    if (a.q_segments != nullptr) q_range.add(a.q_segments[kb.b * a.N + n]);
  }
  return live && (a.q_segments == nullptr || segments_meet(a, q_range, kv_range));
}

template <class C>
MMFAST_INLINE SegmentRange key_range(const CrossAttentionArgs& a, const KeyBlock& kb) {
  SegmentRange range;
  if (a.kv_segments != nullptr)
    for (int64_t i = 0; i < kb.here; ++i) range.add(a.kv_segments[kb.b * a.M + kb.m0 + i]);
  return range;
}

// Which keys of the block any row of the item's group may see.
template <class C>
MMFAST_NOINLINE void bwd_seen(const CrossAttentionArgs& a, const BwdScratch<C>& x,
                              const KeyBlock& kb, const SegmentRange& range, int64_t queries,
                              int64_t total) {
  using Acc = typename C::Acc;
  memset(x.seen, 0, size_t(kb.cols));
  for (int64_t r0 = 0; r0 < total; r0 += kTileQueries) {
    const int64_t count = min64(kTileQueries, total - r0);
    if (!bwd_rows_of<C>(a, x, kb, range, queries, r0, count)) continue;
    for (int64_t r = 0; r < count; ++r)
      if (x.rows[r].limit > kb.m0) accumulate_seen<Acc>(a, x.rows[r], kb.m0, kb.cols, x.seen);
  }
}

template <class C>
MMFAST_INLINE void store_key_gradients(const CrossAttentionArgs& a, const BwdScratch<C>& x,
                                       const KeyBlock& kb, bool check_seen) {
  using Acc = typename C::Acc;
  const Widths<C> wd(a.D), wv(a.Dv);
  for (int64_t i = 0; i < kb.here; ++i) {
    const bool zero = check_seen && !x.seen[i];
    const auto put = [&](const mmfast::Strided& t, const Acc* from, int64_t width) {
      char* to = byte_offset(t.data, t.dtype, t.offset(kb.b, kb.g, kb.m0 + i));
      if (zero)
        memset(to, 0, size_t(width * mmfast::dtype_bytes(t.dtype)));
      else
        write_row<Acc>(t.dtype, to, from, width, Acc(1));
    };
    put(a.dk, x.dk + i * wd.cols, a.D);
    if (a.dv.data != nullptr) put(a.dv, x.dv + i * wv.cols, a.Dv);
  }
}

MMFAST_INLINE void zero_rows(const mmfast::Strided& t, int64_t b, int64_t h, int64_t begin,
                             int64_t end, int64_t width) {
  if (t.data == nullptr) return;
  for (int64_t i = begin; i < end; ++i)
    memset(byte_offset(t.data, t.dtype, t.offset(b, h, i)), 0,
           size_t(width * mmfast::dtype_bytes(t.dtype)));
}

template <class C, bool PLAIN>
MMFAST_INLINE void bwd_keys(const CrossAttentionArgs& a, const BwdScratch<C>& x, int64_t b,
                            int64_t g, int64_t chunk, int64_t begin, int64_t end) {
  using Acc = typename C::Acc;
  const Widths<C> wd(a.D), wv(a.Dv);
  const int64_t queries = valid_queries(a, b), total = a.H / a.G * queries;
  const bool check_seen = !PLAIN && has_conditions(a);
  const int64_t height = even_pieces(total, kTileQueries, reduce_align<C>());
  int64_t block = 0;
  for (int64_t m0 = begin; m0 < end; m0 += block) {
    block = next_block(end - m0, kUsualKeys, mmfast::kBackwardKeys);
    KeyBlock kb = key_block<C>(b, g, m0, m0 + block);
    kb.only = dq_written_once(a);
    const SegmentRange range = key_range<C>(a, kb);
    if (check_seen) bwd_seen<C>(a, x, kb, range, queries, total);
    const Natural<C> k = bwd_pack_keys<C>(a, x, kb, check_seen);
    bool first = true;
    for (int64_t r0 = 0; r0 < total; r0 += height) {
      const int64_t count = min64(height, total - r0);
      if (!bwd_rows_of<C>(a, x, kb, range, queries, r0, count)) {
        for (int64_t r = 0; r < count && kb.only; ++r)
          memset(dq_storage(a, x.rows[r]), 0, size_t(a.D * mmfast::dtype_bytes(a.dq.dtype)));
        continue;
      }
      const TileRows<C> t = bwd_pack_rows<C>(a, x, count);
      bwd_tile<C, PLAIN>(a, x, kb, t);
      for (int64_t r = 0; r < count; ++r)
        collect_row<Acc>(a, x.rows[r], x.dp + r * kTileKeys, m0, kb.here, kb.cols, chunk);
      bwd_products<C>(a, x, kb, k, t, chunk, first);
      first = false;
    }
    if (first || a.dout.data == nullptr) memset(x.dv, 0, size_t(kb.here * wv.cols) * sizeof(Acc));
    if (first) memset(x.dk, 0, size_t(kb.here * wd.cols) * sizeof(Acc));
    store_key_gradients<C>(a, x, kb, check_seen);
  }
}

template <class C>
int64_t bwd_tasks(const CrossAttentionArgs& a) {
  return a.B * a.G * a.key_chunks;
}
template <class C>
int64_t bwd_scratch(const CrossAttentionArgs& a) {
  return BwdScratch<C>(a, nullptr).bytes;
}

template <class C>
MMFAST_NOINLINE void bwd_run(const CrossAttentionArgs& a, int64_t task, void* base) {
  using Acc = typename C::Acc;
  const BwdScratch<C> x(a, base);
  const int64_t chunk = task % a.key_chunks, bg = task / a.key_chunks;
  const int64_t b = bg / a.G, g = bg % a.G, group = a.H / a.G;
  const int64_t begin = min64(chunk * a.chunk_keys, a.M);
  const int64_t end = min64(begin + a.chunk_keys, stored_keys(a, b));
  // Rows that a single block writes once need no zeros before.
  const bool untouched = dq_written_once(a) && valid_keys(a, b) > 0;
  for (int64_t r = 0; r < group * a.N; ++r) {
    const Row row{b, g * group + r / a.N, r % a.N, 0};
    if (untouched && row.n < valid_queries(a, b)) continue;
    if (a.dq_acc == nullptr && !has_query(a, b, row.n)) continue;
    if (dq_written_once(a))
      memset(dq_storage(a, row), 0, size_t(a.D * mmfast::dtype_bytes(a.dq.dtype)));
    else
      memset(dq_row<Acc>(a, row, chunk), 0, size_t(a.D) * sizeof(Acc));
  }
  const int64_t live_end = max64(min64(end, valid_keys(a, b)), begin);
  const int64_t zero_from = valid_queries(a, b) == 0 ? begin : live_end;
  zero_rows(a.dk, b, g, zero_from, end, a.D);
  zero_rows(a.dv, b, g, zero_from, end, a.Dv);
  if (valid_queries(a, b) == 0) return;
  if (plain_scores(a))
    bwd_keys<C, true>(a, x, b, g, chunk, begin, live_end);
  else
    bwd_keys<C, false>(a, x, b, g, chunk, begin, live_end);
}

// ---- the addends of dq, summed in order and rounded once ---------------------------------------

constexpr int64_t kRowsPerTask = 64;

template <class Acc>
MMFAST_INLINE void finish_dq(const CrossAttentionArgs& a, int64_t b, int64_t h, int64_t n,
                             Acc* sum) {
  if (!has_query(a, b, n)) return;
  constexpr int L = lanes<Acc>();
  const Acc* part = static_cast<const Acc*>(a.dq_acc) + ((b * a.H + h) * a.N + n) * a.D;
  const int64_t step = a.B * a.H * a.N * a.D;
  memcpy(sum, part, size_t(a.D) * sizeof(Acc));
  for (int64_t c = 1; c < a.key_chunks; ++c) {
    const Acc* more = part + c * step;
    int64_t d = 0;
    for (; d + L <= a.D; d += L) store(sum + d, load(sum + d) + load(more + d));
    for (; d < a.D; ++d) sum[d] += more[d];
  }
  write_row<Acc>(a.dq.dtype, byte_offset(a.dq.data, a.dq.dtype, a.dq.offset(b, h, n)), sum, a.D,
                 Acc(1));
}

template <class C>
int64_t bwd_dq_tasks(const CrossAttentionArgs& a) {
  return a.dq_acc == nullptr ? 0 : a.B * a.H * ceil_div(a.N, kRowsPerTask);
}
template <class C>
int64_t bwd_dq_scratch(const CrossAttentionArgs& a) {
  return round_up(a.D, lanes<typename C::Acc>()) * int64_t(sizeof(typename C::Acc));
}
template <class C>
void bwd_dq_run(const CrossAttentionArgs& a, int64_t task, void* scratch) {
  using Acc = typename C::Acc;
  const int64_t blocks = ceil_div(a.N, kRowsPerTask), bh = task / blocks;
  const int64_t begin = task % blocks * kRowsPerTask;
  for (int64_t n = begin; n < min64(begin + kRowsPerTask, a.N); ++n)
    finish_dq<Acc>(a, bh / a.H, bh % a.H, n, static_cast<Acc*>(scratch));
}

}  // namespace
