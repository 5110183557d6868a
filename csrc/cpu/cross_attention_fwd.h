// Forward of cross_attention: one task is a chunk of the query rows that share a key/value head.
// Keys come in blocks; each block is packed once a task and met by all its rows, a few at a time,
// with the online softmax. Scores never leave the first-level cache.
#pragma once
#include "pack.h"
#include "scores.h"

namespace {

constexpr int64_t kFwdRows = MMFAST_FWD_ROWS;    // most rows in a task
constexpr int64_t kFwdKeys = MMFAST_FWD_KEYS;    // keys in a block
constexpr int64_t kFwdStrip = MMFAST_FWD_STRIP;  // rows whose scores are alive at a time

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

template <class C>
struct FwdScratch {
  using E = typename C::E;
  using Acc = typename C::Acc;
  Row* rows;
  E *q, *kv_rows, *k, *v;
  Acc *o, *top, *sum, *alpha, *s, *keep;
  uint8_t* seen;
  int64_t bytes;
  FwdScratch(const CrossAttentionArgs& a, void* base) {
    const Widths<C> wd(a.D), wv(a.Dv);
    const int64_t rows_max = RowChunks(a).most();
    const int64_t panel = kTileVectors * lanes<Acc>();
    Arena arena{static_cast<char*>(base)};
    rows = arena.take<Row>(rows_max);
    q = arena.take<E>(rows_max * wd.rows_ld);
    kv_rows = arena.take<E>(kFwdKeys * max64(wd.rows_ld, wv.rows_ld));
    k = arena.take<E>(round_up(kFwdKeys, panel) * wd.steps);
    v = arena.take<E>(kFwdKeys / C::PAIR * wv.cols);
    o = arena.take<Acc>(rows_max * wv.cols);
    top = arena.take<Acc>(rows_max);
    sum = arena.take<Acc>(rows_max);
    alpha = arena.take<Acc>(rows_max);
    s = arena.take<Acc>(kFwdStrip * kFwdKeys);
    keep = arena.take<Acc>(kFwdKeys);
    seen = arena.take<uint8_t>(kFwdKeys + 64);
    bytes = arena.used;
  }
};

// Softmax step of one row: scores -> probabilities (unnormalised), running maximum and sum.
// Returns the factor that what was summed so far has to be multiplied with.
template <class Acc, bool PLAIN>
MMFAST_INLINE Acc softmax_step(const CrossAttentionArgs& a, const Row& row, Acc* s, int64_t m0,
                               int64_t cols, Acc* keep, Acc& top, Acc& sum) {
  constexpr int L = lanes<Acc>();
  finish_scores<Acc, PLAIN>(a, row, s, m0, cols);
  Vec<Acc> high = load(s);
  for (int64_t c = L; c < cols; c += L) high = max_dropping_nan(load(s + c), high);
  high = high == high ? high : minus_infinity<Acc>();
  const Acc factor = PLAIN ? Acc(a.scale * kLog2e) : Acc(1);
  const Acc here = reduce_max<Acc>(high) * factor;
  const Acc next = here > top ? here : top;
  const Acc offset = next == Acc(-__builtin_inf()) ? Acc(0) : next;
  const Vec<Acc> offset_v = splat<Acc>(offset);
  Vec<Acc> total{};
  for (int64_t c = 0; c < cols; c += L) {
    const Vec<Acc> p = exp2v(load(s + c) * factor - offset_v);
    total += p;
    store(s + c, p);
  }
  const Acc alpha = next == top ? Acc(1) : exp2v(splat<Acc>(top - offset))[0];
  sum = sum * alpha + reduce_add<Acc>(total);
  top = next;
  if (a.seed != nullptr) {
    dropout_factors<Acc>(a, row, m0, cols, keep);
    for (int64_t c = 0; c < cols; c += L) store(s + c, load(s + c) * load(keep + c));
  }
  return alpha;
}

MMFAST_INLINE float log2_of(float x) { return log2f(x); }
MMFAST_INLINE double log2_of(double x) { return log2(x); }

// out row = o / sum * sigmoid(gate); lse = (top + log2(sum)) ln 2.
template <class Acc>
MMFAST_NOINLINE void finish_row(const CrossAttentionArgs& a, const Row& row, Acc* o, Acc top,
                                Acc sum) {
  constexpr int L = lanes<Acc>();
  const bool nothing = sum == Acc(0);
  const Acc inverse = nothing ? Acc(0) : Acc(1) / sum;
  char* out = byte_offset(a.out.data, a.out.dtype,
                          row.b * a.out.sb + row.h * a.out.sh + row.n * a.out.sn);
  static_cast<Acc*>(a.lse)[(row.b * a.H + row.h) * a.N + row.n] =
      nothing ? Acc(-__builtin_inf()) : Acc((top + log2_of(sum)) * Acc(kLn2));
  if (nothing) {
    memset(out, 0, size_t(a.Dv * mmfast::dtype_bytes(a.out.dtype)));
    return;
  }
  if (a.gate.data != nullptr) {
    const int64_t at = row.b * a.gate.sb + row.h * a.gate.sh + row.n * a.gate.sn;
    if (a.gate.sm == 0) {
      const Acc g = sigmoidv<Acc>(splat<Acc>(read_one<Acc>(a.gate.dtype, a.gate.data, at)))[0];
      write_row<Acc>(a.out.dtype, out, o, a.Dv, inverse * g);
      return;
    }
    for (int64_t d = 0; d < a.Dv; d += L) {
      Acc g[L];
      read_row<Acc>(a.gate.dtype, byte_offset(a.gate.data, a.gate.dtype, at + d), g,
                    min64(L, a.Dv - d), L);
      store(o + d, load(o + d) * sigmoidv<Acc>(load(g)));
    }
  }
  write_row<Acc>(a.out.dtype, out, o, a.Dv, inverse);
}

template <class Acc>
MMFAST_INLINE void finish_padded_row(const CrossAttentionArgs& a, int64_t b, int64_t h,
                                     int64_t n) {
  memset(byte_offset(a.out.data, a.out.dtype, b * a.out.sb + h * a.out.sh + n * a.out.sn), 0,
         size_t(a.Dv * mmfast::dtype_bytes(a.out.dtype)));
  static_cast<Acc*>(a.lse)[(b * a.H + h) * a.N + n] = Acc(-__builtin_inf());
}

template <class C>
MMFAST_INLINE const void* strided_row(const mmfast::Strided& t, int64_t b, int64_t h, int64_t n) {
  return byte_offset(static_cast<const void*>(t.data), t.dtype, b * t.sb + h * t.sh + n * t.sn);
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
                              int64_t keys, const FwdScratch<C>& x) {
  using Acc = typename C::Acc;
  const Widths<C> wd(a.D), wv(a.Dv);
  for (int64_t m0 = 0; m0 < keys; m0 += kFwdKeys) {
    const int64_t here = min64(kFwdKeys, keys - m0);
    const int64_t cols = round_up(here, column_align<Acc>());
    const int64_t deep = round_up(here, reduce_align<C>());
    SegmentRange kv_range;
    if (a.kv_segments != nullptr)
      for (int64_t m = m0; m < m0 + here; ++m) kv_range.add(a.kv_segments[b * a.M + m]);
    bool packed = false;
    for (int64_t r0 = 0; r0 < count; r0 += kFwdStrip) {
      const int64_t strip = min64(kFwdStrip, count - r0);
      bool live = false;
      SegmentRange q_range;
      for (int64_t r = r0; r < r0 + strip; ++r) {
        live |= x.rows[r].limit > m0;
        if (a.q_segments != nullptr) q_range.add(a.q_segments[b * a.N + x.rows[r].n]);
      }
      if (!live || (a.q_segments != nullptr && !segments_meet(a, q_range, kv_range))) continue;
      if (!packed) {
        packed = true;
        pack_rows<C>(here, here, wd, a.k.dtype, x.kv_rows,
                     [&](int64_t i) { return strided_row<C>(a.k, b, g, m0 + i); });
        pack_transposed<C>(x.kv_rows, here, wd, x.k);
        if (!PLAIN && has_conditions(a)) seen_keys<Acc>(a, x.rows, count, m0, cols, x.seen);
        auto* v_rows = C::PAIR == 1 ? x.v : x.kv_rows;
        pack_rows<C>(here, deep, wv, a.v.dtype, v_rows, [&](int64_t i) -> const void* {
          if (!PLAIN && has_conditions(a) && !x.seen[i]) return nullptr;
          return strided_row<C>(a.v, b, g, m0 + i);
        });
        pack_natural<C>(v_rows, deep, wv, x.v);
      }
      // The next block of keys travels while this one is worked on.
      const int64_t next = min64(kFwdKeys, keys - m0 - here);
      for (int64_t i = next * r0 / count; i < next * (r0 + strip) / count; ++i) {
        prefetch_row(strided_row<C>(a.k, b, g, m0 + here + i), a.k.dtype, a.D);
        prefetch_row(strided_row<C>(a.v, b, g, m0 + here + i), a.v.dtype, a.Dv);
      }
      product<C, false>(strip, cols, wd.steps, x.q + r0 * wd.rows_ld, wd.rows_ld, x.k,
                        transposed_layout(wd), x.s, kFwdKeys, Start::ZERO, nullptr);
      for (int64_t r = 0; r < strip; ++r) {
        Acc* s = x.s + r * kFwdKeys;
        x.alpha[r] = softmax_step<Acc, PLAIN>(a, x.rows[r0 + r], s, m0, cols, x.keep,
                                              x.top[r0 + r], x.sum[r0 + r]);
        for (int64_t c = cols; c < round_up(deep, lanes<Acc>()); ++c) s[c] = 0;
        probabilities_to_elements<C>(s, round_up(deep, lanes<Acc>()));
      }
      product<C, false>(strip, wv.cols, deep / C::PAIR,
                        reinterpret_cast<const typename C::E*>(x.s), kFwdKeys, x.v,
                        natural_layout<C>(wv.cols), x.o + r0 * wv.cols, wv.cols, Start::SCALE_ADD,
                        x.alpha);
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
  pack_rows<C>(count, count, wd, a.q.dtype, x.q, [&](int64_t i) {
    return strided_row<C>(a.q, b, x.rows[i].h, x.rows[i].n);
  });
  for (int64_t r = 0; r < count; ++r) {
    x.top[r] = Acc(-__builtin_inf());
    x.sum[r] = 0;
  }
  memset(x.o, 0, size_t(count * wv.cols) * sizeof(Acc));
  if (plain_scores(a))
    fwd_blocks<C, true>(a, b, g, count, keys, x);
  else
    fwd_blocks<C, false>(a, b, g, count, keys, x);
  for (int64_t r = 0; r < count; ++r)
    finish_row<Acc>(a, x.rows[r], x.o + r * wv.cols, x.top[r], x.sum[r]);
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
