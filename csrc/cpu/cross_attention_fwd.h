// Forward of cross_attention: one task is a chunk of the query rows that share a key/value head.
// Keys come in blocks; each block is packed once a task and met by all its rows, a few at a time,
// with the online softmax. Scores never leave the first-level cache.
#pragma once
#include "pack.h"
#include "scores.h"

namespace {

constexpr int64_t kFwdRows = MMFAST_FWD_ROWS;    // most rows in a task
constexpr int64_t kFwdKeys = MMFAST_FWD_KEYS;    // most keys in a block; usually whole 64s
constexpr int64_t kFwdStrip = MMFAST_FWD_STRIP;  // rows whose scores are alive at a time
constexpr int64_t kFewStrips = 64;               // up to here a copy of V does not pay

template <class Acc>
constexpr int64_t column_align() {
  return lanes<Acc>() < 4 ? 4 : lanes<Acc>();
}

// Bump allocation in the scratch of a thread; with base null it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
    return p;
  }
};

struct RowChunks {
  int64_t rows, chunks;
  explicit RowChunks(const CrossAttentionArgs& a) {
    rows = a.H / a.G * a.N;
    chunks = max64(ceil_div(rows, kFwdRows), 1);
  }
  int64_t begin(int64_t chunk) const { return chunk * rows / chunks; }
  int64_t most() const { return ceil_div(rows, chunks); }
};

// Running maxima are read and written in whole vectors, so each strip has room of its own.
constexpr int64_t kTopsOfStrip = (kFwdStrip + 15) / 16 * 16;

template <class C>
struct FwdScratch {
  using E = typename C::E;
  using Acc = typename C::Acc;
  Row* rows;
  E *q, *kv_rows, *k, *v;
  Acc *o, *top, *sum, *alpha, *offset, *s, *keep;
  uint8_t *seen, *touched;  // touched: strips whose outputs hold something
  int64_t bytes;
  FwdScratch(const CrossAttentionArgs& a, void* base) {
    const Widths<C> wd(a.D), wv(a.Dv);
    const int64_t rows_max = RowChunks(a).most();
    const int64_t strips_max = ceil_div(rows_max, kFwdStrip);
    const int64_t panel = kTileVectors * lanes<Acc>();
    Arena arena{static_cast<char*>(base)};
    rows = arena.take<Row>(rows_max);
    q = arena.take<E>(rows_max * wd.rows_ld);
    kv_rows = arena.take<E>(kFwdKeys * max64(wd.rows_ld, wv.rows_ld));
    k = arena.take<E>(round_up(kFwdKeys, panel) * wd.steps);
    v = arena.take<E>(C::PAIR == 1 ? 0 : kFwdKeys / C::PAIR * wv.cols);
    o = arena.take<Acc>(rows_max * wv.cols);
    top = arena.take<Acc>(strips_max * kTopsOfStrip);
    sum = arena.take<Acc>(rows_max + lanes<Acc>());
    alpha = arena.take<Acc>(kFwdStrip + lanes<Acc>());
    offset = arena.take<Acc>(kFwdStrip + lanes<Acc>());
    s = arena.take<Acc>(kFwdStrip * kFwdKeys);
    keep = arena.take<Acc>(kFwdKeys);
    seen = arena.take<uint8_t>(kFwdKeys + 64);
    touched = arena.take<uint8_t>(strips_max);
    bytes = arena.used;
  }
};

// Largest score of a row, in units of log2.
template <class Acc, bool PLAIN>
MMFAST_INLINE Acc row_top(const CrossAttentionArgs& a, const Row& row, Acc* s, int64_t m0,
                          int64_t cols) {
  constexpr int L = lanes<Acc>();
  finish_scores<Acc, PLAIN>(a, row, s, m0, cols);
  Vec<Acc> high = minus_infinity<Acc>();
  for (int64_t c = 0; c < cols; c += L) high = max_dropping_nan(load(s + c), high);
  return reduce_max<Acc>(high) * (PLAIN ? Acc(a.scale * kLog2e) : Acc(1));
}

// Scores -> probabilities over 2^offset, dropped where dropout says so; returns their sum before.
template <class Acc, bool PLAIN>
MMFAST_INLINE Acc row_exp(const CrossAttentionArgs& a, const Row& row, Acc* s, int64_t m0,
                          int64_t cols, Acc offset, Acc* keep) {
  constexpr int L = lanes<Acc>();
  const Acc factor = PLAIN ? Acc(a.scale * kLog2e) : Acc(1);
  const Vec<Acc> offset_v = splat<Acc>(offset);
  Vec<Acc> total{};
  for (int64_t c = 0; c < cols; c += L) {
    const Vec<Acc> p = exp2v(load(s + c) * factor - offset_v);
    total += p;
    store(s + c, p);
  }
  if (a.seed != nullptr) {
    dropout_factors<Acc>(a, row, m0, cols, keep);
    for (int64_t c = 0; c < cols; c += L) store(s + c, load(s + c) * load(keep + c));
  }
  return reduce_add<Acc>(total);
}

// The online softmax of `count` rows over one block of keys: scores become probabilities, top and
// sum move on, alpha is what the sums and outputs so far have to be multiplied with.
template <class Acc, bool PLAIN>
MMFAST_INLINE void softmax_strip(const CrossAttentionArgs& a, const Row* rows, int64_t count,
                                 Acc* s, int64_t ld, int64_t m0, int64_t cols, Acc* top, Acc* sum,
                                 Acc* alpha, Acc* offset, Acc* keep) {
  constexpr int L = lanes<Acc>();
  for (int64_t r = 0; r < count; ++r)
    offset[r] = row_top<Acc, PLAIN>(a, rows[r], s + r * ld, m0, cols);
  for (int64_t r = 0; r < count; r += L) {
    const Vec<Acc> before = load(top + r), here = load(offset + r);
    const Vec<Acc> next = here > before ? here : before;
    const Vec<Acc> base = next == minus_infinity<Acc>() ? Vec<Acc>{} : next;
    store(alpha + r, exp2v(before - base));
    store(offset + r, base);
    store(top + r, next);
  }
  for (int64_t r = 0; r < count; ++r) {
    const Acc part = row_exp<Acc, PLAIN>(a, rows[r], s + r * ld, m0, cols, offset[r], keep);
    sum[r] = sum[r] * alpha[r] + part;
  }
}

// out row = o / sum * sigmoid(gate).
template <class Acc>
MMFAST_INLINE void finish_row(const CrossAttentionArgs& a, const Row& row, Acc* o, Acc inverse) {
  constexpr int L = lanes<Acc>();
  char* out = byte_offset(a.out.data, a.out.dtype, a.out.offset(row.b, row.h, row.n));
  if (inverse == Acc(0)) {  // nothing to attend
    if (!has_query(a, row.b, row.n)) return;
    memset(out, 0, size_t(a.Dv * mmfast::dtype_bytes(a.out.dtype)));
    return;
  }
  if (a.gate.data != nullptr) {
    const int64_t at = a.gate.offset(row.b, row.h, row.n);
    if (a.gate.sm == 0) {
      inverse *= sigmoidv<Acc>(splat<Acc>(read_one<Acc>(a.gate.dtype, a.gate.data, at)))[0];
    } else {
      for (int64_t d = 0; d < a.Dv; d += L) {
        Acc g[L];
        read_row<Acc>(a.gate.dtype, byte_offset(a.gate.data, a.gate.dtype, at + d), g,
                      min64(L, a.Dv - d), L);
        store(o + d, load(o + d) * sigmoidv<Acc>(load(g)));
      }
    }
  }
  write_row<Acc>(a.out.dtype, out, o, a.Dv, inverse);
}

// The results of a strip: out, and lse = (top + log2(sum)) ln 2.
template <class Acc>
MMFAST_NOINLINE void finish_strip(const CrossAttentionArgs& a, const Row* rows, int64_t count,
                                  Acc* o, int64_t o_ld, const Acc* top, const Acc* sum) {
  constexpr int L = lanes<Acc>();
  for (int64_t r = 0; r < count; r += L) {
    const Vec<Acc> total = load(sum + r);
    const Vec<Acc> lse = (load(top + r) + log2v(total)) * Acc(kLn2);
    const Vec<Acc> inverse = total == Acc(0) ? Vec<Acc>{} : Acc(1) / total;
    for (int64_t i = 0; i < min64(L, count - r); ++i) {
      const Row& row = rows[r + i];
      static_cast<Acc*>(a.lse)[(row.b * a.H + row.h) * a.N + row.n] =
          inverse[i] == Acc(0) ? Acc(-__builtin_inf()) : lse[i];
      finish_row<Acc>(a, row, o + (r + i) * o_ld, inverse[i]);
    }
  }
}

template <class Acc>
MMFAST_INLINE void finish_padded_row(const CrossAttentionArgs& a, int64_t b, int64_t h, int64_t n) {
  if (has_query(a, b, n))
    memset(byte_offset(a.out.data, a.out.dtype, a.out.offset(b, h, n)), 0,
           size_t(a.Dv * mmfast::dtype_bytes(a.out.dtype)));
  static_cast<Acc*>(a.lse)[(b * a.H + h) * a.N + n] = Acc(-__builtin_inf());
}

template <class C>
MMFAST_INLINE const void* strided_row(const mmfast::Strided& t, int64_t b, int64_t h, int64_t n) {
  return byte_offset(static_cast<const void*>(t.data), t.dtype, t.offset(b, h, n));
}

// Keys of block m0 that some row in the list may see.
template <class Acc>
MMFAST_INLINE void seen_keys(const CrossAttentionArgs& a, const Row* rows, int64_t count,
                             int64_t m0, int64_t cols, uint8_t* seen) {
  memset(seen, 0, size_t(cols));
  for (int64_t r = 0; r < count; ++r) {
    // Heads and rows that share one row of the mask need no second look.
    const bool same = r > 0 && a.q_segments == nullptr && a.mask.sn == 0 && a.mask.sh == 0 &&
                      rows[r].limit == rows[r - 1].limit;
    if (!same && rows[r].limit > m0) accumulate_seen<Acc>(a, rows[r], m0, cols, seen);
  }
}

template <class C, bool PLAIN>
MMFAST_INLINE void fwd_blocks(const CrossAttentionArgs& a, int64_t b, int64_t g, int64_t count,
                              int64_t keys, int64_t height, Rows<C> q, const FwdScratch<C>& x) {
  using Acc = typename C::Acc;
  const Widths<C> wd(a.D), wv(a.Dv);
  int64_t here = 0;
  for (int64_t m0 = 0; m0 < keys; m0 += here) {
    here = next_block(keys - m0, kFwdKeys / 64 * 64, kFwdKeys);
    const int64_t cols = round_up(here, column_align<Acc>());
    const int64_t deep = round_up(here, reduce_align<C>());
    SegmentRange kv_range;
    if (a.kv_segments != nullptr)
      for (int64_t m = m0; m < m0 + here; ++m) kv_range.add(a.kv_segments[b * a.M + m]);
    bool packed = false;
    Natural<C> v{};
    for (int64_t index = 0; index * height < count; ++index) {
      const int64_t r0 = index * height, strip = min64(height, count - r0);
      bool live = false;
      SegmentRange q_range;
      for (int64_t r = r0; r < r0 + strip; ++r) {
        live |= x.rows[r].limit > m0;
        if (a.q_segments != nullptr) q_range.add(a.q_segments[b * a.N + x.rows[r].n]);
      }
      if (!live || (a.q_segments != nullptr && !segments_meet(a, q_range, kv_range))) continue;
      if (!packed) {
        packed = true;
        pack_transposed<C>(rows_of_head<C>(a.k, b, g, m0, here, wd, x.kv_rows), here, wd, x.k);
        if (!PLAIN && has_conditions(a)) seen_keys<Acc>(a, x.rows, count, m0, cols, x.seen);
        // Padding rows of V meet probabilities of 0; they only have to be finite.
        const bool whole = PLAIN || !has_conditions(a);
        const bool in_place = deep == here && (count <= kFewStrips || rows_adjoin<C>(a.v, wv));
        if (whole && (C::PAIR == 2 || in_place)) {
          v = pack_natural<C>(rows_of_head<C>(a.v, b, g, m0, here, wv, x.kv_rows), here, deep, wv,
                              x.v);
        } else {
          const auto row = [&](int64_t i) -> const void* {
            return whole || x.seen[i] ? strided_row<C>(a.v, b, g, m0 + i) : nullptr;
          };
          v = pack_natural<C>(pack_rows<C>(here, deep, wv, a.v.dtype, x.kv_rows, row), deep, deep,
                              wv, x.v);
        }
      }
      product<C, false>(strip, cols, wd.steps, q.data + r0 * q.ld, q.ld, x.k, transposed_layout(wd),
                        x.s, kFwdKeys, Start::ZERO, nullptr);
      softmax_strip<Acc, PLAIN>(a, x.rows + r0, strip, x.s, kFwdKeys, m0, cols,
                                x.top + index * kTopsOfStrip, x.sum + r0, x.alpha, x.offset,
                                x.keep);
      const int64_t filled = round_up(deep, lanes<Acc>());
      for (int64_t r = 0; r < strip; ++r) {
        Acc* s = x.s + r * kFwdKeys;
        for (int64_t c = cols; c < filled; ++c) s[c] = 0;
        probabilities_to_elements<C>(s, filled);
      }
      product<C, false>(strip, wv.cols, deep / C::PAIR, reinterpret_cast<const typename C::E*>(x.s),
                        kFwdKeys, v.data, v.layout(), x.o + r0 * wv.cols, wv.cols,
                        x.touched[index] ? Start::SCALE_ADD : Start::ZERO, x.alpha);
      x.touched[index] = 1;
    }
  }
}

template <class C>
MMFAST_NOINLINE void fwd_run(const CrossAttentionArgs& a, int64_t task, void* base) {
  using Acc = typename C::Acc;
  const RowChunks chunks(a);
  const int64_t chunk = task % chunks.chunks, bg = task / chunks.chunks;
  const int64_t b = bg / a.G, g = bg % a.G, group = a.H / a.G;
  const FwdScratch<C> x(a, base);
  const Widths<C> wd(a.D), wv(a.Dv);
  const int64_t queries = valid_queries(a, b);
  int64_t count = 0, keys = 0;
  for (int64_t r = chunks.begin(chunk); r < chunks.begin(chunk + 1); ++r) {
    const int64_t h = g * group + r / a.N, n = r % a.N;
    if (n >= queries) {
      finish_padded_row<Acc>(a, b, h, n);
      continue;
    }
    x.rows[count] = make_row(a, b, h, n);
    keys = max64(keys, x.rows[count].limit);
    ++count;
  }
  // Rows of one head lie evenly in memory; several heads that share keys have to be gathered.
  const bool one_head = count > 0 && x.rows[0].h == x.rows[count - 1].h;
  const Rows<C> q = one_head ? rows_of_head<C>(a.q, b, x.rows[0].h, x.rows[0].n, count, wd, x.q)
                             : pack_rows<C>(count, count, wd, a.q.dtype, x.q, [&](int64_t i) {
                                 return strided_row<C>(a.q, b, x.rows[i].h, x.rows[i].n);
                               });
  const int64_t height = even_pieces(count, kFwdStrip, 1), strips = ceil_div(count, height);
  for (int64_t i = 0; i < strips * kTopsOfStrip; ++i) x.top[i] = Acc(-__builtin_inf());
  memset(x.sum, 0, size_t(count) * sizeof(Acc));
  memset(x.touched, 0, size_t(strips));
  if (plain_scores(a))
    fwd_blocks<C, true>(a, b, g, count, keys, height, q, x);
  else
    fwd_blocks<C, false>(a, b, g, count, keys, height, q, x);
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t r0 = i * height;
    finish_strip<Acc>(a, x.rows + r0, min64(height, count - r0), x.o + r0 * wv.cols, wv.cols,
                      x.top + i * kTopsOfStrip, x.sum + r0);
  }
}

template <class C>
int64_t fwd_tasks(const CrossAttentionArgs& a) {
  return a.B * a.G * RowChunks(a).chunks;
}
template <class C>
int64_t fwd_scratch(const CrossAttentionArgs& a) {
  return FwdScratch<C>(a, nullptr).bytes;
}

}  // namespace
