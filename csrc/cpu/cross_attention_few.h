// Few queries a key/value head (attention pooling, decoding): nothing is packed, since a key is met
// by a handful of rows only and the time is that of reading K and V once. A task takes neighbouring
// heads together: in [B, N, H, D] memory they are one piece, and memory is read in order.
#pragma once
#include "cross_attention_bwd.h"

namespace {

constexpr int64_t kFewHeads = 4;  // key/value heads of a task
constexpr int64_t kFewKeys = 64;  // keys in a block
constexpr int64_t kFewAhead = 4;  // rows of keys that are fetched ahead

MMFAST_INLINE int64_t few_heads(const CrossAttentionArgs& a) {
  return a.B * a.G >= 16 * kFewHeads ? kFewHeads : 1;
}
MMFAST_INLINE int64_t few_head_blocks(const CrossAttentionArgs& a) {
  return ceil_div(a.G, few_heads(a));
}

template <class Acc>
struct FewScratch {
  Row* rows;
  Acc *q, *dout, *o, *dq, *top, *sum, *alpha, *offset, *delta, *s, *dp, *keep;
  uint8_t* seen;
  int64_t bytes, d_cols, v_cols;
  FewScratch(const CrossAttentionArgs& a, void* base) {
    constexpr int64_t most = kFewHeads * kFewRows;
    d_cols = round_up(a.D, lanes<Acc>()), v_cols = round_up(a.Dv, lanes<Acc>());
    Arena arena{static_cast<char*>(base)};
    rows = arena.take<Row>(most);
    q = arena.take<Acc>(most * d_cols);
    dq = arena.take<Acc>(most * d_cols);
    o = arena.take<Acc>(most * v_cols);
    dout = arena.take<Acc>(most * v_cols);
    top = arena.take<Acc>(kTopsOfStrip);
    sum = arena.take<Acc>(most + lanes<Acc>());
    alpha = arena.take<Acc>(round_up(most, lanes<Acc>()));
    offset = arena.take<Acc>(round_up(most, lanes<Acc>()));
    delta = arena.take<Acc>(most);
    s = arena.take<Acc>(most * kFewKeys);
    dp = arena.take<Acc>(most * kFewKeys);
    keep = arena.take<Acc>(kFewKeys);
    seen = arena.take<uint8_t>(kFewHeads * (kFewKeys + 64));
    bytes = arena.used;
  }
};

// out[r * ld] = <rows[r], x> for R rows of compute type (zeros past `width`) and one row of
// storage.
template <class S, int R>
MMFAST_INLINE void dots(const typename S::Acc* rows, int64_t rows_ld, const void* x, int64_t width,
                        typename S::Acc* out, int64_t ld) {
  using Acc = typename S::Acc;
  constexpr int L = lanes<Acc>();
  const auto* p = static_cast<const typename S::Bits*>(x);
  Vec<Acc> sum[R] = {};
  int64_t d = 0;
  for (; d + L <= width; d += L) {
    const Vec<Acc> v = S::loadv(p + d);
    MMFAST_UNROLL for (int r = 0; r < R; ++r) sum[r] += load(rows + r * rows_ld + d) * v;
  }
  if (d < width) {
    Acc tail[L];
    read_row<S>(p + d, tail, width - d, L);
    MMFAST_UNROLL for (int r = 0; r < R; ++r) sum[r] += load(rows + r * rows_ld + d) * load(tail);
  }
  MMFAST_UNROLL for (int r = 0; r < R; ++r) out[r * ld] = reduce_add<Acc>(sum[r]);
}

// to[r] += weight[r * ld] * x for R rows.
template <class S, int R>
MMFAST_INLINE void add_scaled(typename S::Acc* to, int64_t to_ld, const typename S::Acc* weight,
                              int64_t ld, const void* x, int64_t width) {
  using Acc = typename S::Acc;
  constexpr int L = lanes<Acc>();
  const auto* p = static_cast<const typename S::Bits*>(x);
  int64_t d = 0;
  for (; d + L <= width; d += L) {
    const Vec<Acc> v = S::loadv(p + d);
    MMFAST_UNROLL for (int r = 0; r < R; ++r) {
      Acc* t = to + r * to_ld + d;
      store(t, load(t) + weight[r * ld] * v);
    }
  }
  for (; d < width; ++d)
    for (int r = 0; r < R; ++r) to[r * to_ld + d] += weight[r * ld] * S::get(p + d);
}

// Results this large leave the caches before anyone reads them: they are written past the caches,
// which saves reading the memory that is about to be overwritten.
constexpr int64_t kStreamedBytes = 8 << 20;

MMFAST_INLINE bool can_stream([[maybe_unused]] const mmfast::Strided& t,
                              [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t width) {
#if defined(__AVX512F__)
  return t.dtype == DType::F32 && rows * width * 4 >= kStreamedBytes && width % 16 == 0 &&
         reinterpret_cast<uintptr_t>(t.data) % 64 == 0 && t.sb % 16 == 0 && t.sh % 16 == 0 &&
         t.sn % 16 == 0;
#else
  return false;
#endif
}
MMFAST_INLINE void streams_done() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// x = sum over R rows of weight[r * ld] * rows[r].
template <class S, int R>
MMFAST_INLINE void store_mix(void* x, const typename S::Acc* rows, int64_t rows_ld,
                             const typename S::Acc* weight, int64_t ld, int64_t width,
                             [[maybe_unused]] bool stream) {
  using Acc = typename S::Acc;
  constexpr int L = lanes<Acc>();
  auto* p = static_cast<typename S::Bits*>(x);
  int64_t d = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(typename S::Bits) == 4) {
    for (; stream && d < width; d += L) {
      VFloat v = load(rows + d) * weight[0];
      MMFAST_UNROLL for (int r = 1; r < R; ++r) v += load(rows + r * rows_ld + d) * weight[r * ld];
      _mm512_stream_ps(p + d, (__m512)v);
    }
  }
#endif
  for (; d + L <= width; d += L) {
    Vec<Acc> v = load(rows + d) * weight[0];
    MMFAST_UNROLL for (int r = 1; r < R; ++r) v += load(rows + r * rows_ld + d) * weight[r * ld];
    S::storev(p + d, v);
  }
  for (; d < width; ++d) {
    Acc v = 0;
    for (int r = 0; r < R; ++r) v += rows[r * rows_ld + d] * weight[r * ld];
    S::put(p + d, v);
  }
}

// What a task works on: key/value heads [g0, g0 + heads) of item b, R rows each.
struct FewTask {
  int64_t b, g0, heads, keys;
};

template <class Acc>
MMFAST_INLINE FewTask few_task(const CrossAttentionArgs& a, int64_t block, int R,
                               const FewScratch<Acc>& x) {
  const int64_t blocks = few_head_blocks(a);
  FewTask t{block / blocks, block % blocks * few_heads(a), 0, 0};
  t.heads = min64(few_heads(a), a.G - t.g0);
  for (int64_t i = 0; i < t.heads * R; ++i) {
    const int64_t r = i % R;
    x.rows[i] = make_row(a, t.b, (t.g0 + i / R) * (a.H / a.G) + r / a.N, r % a.N);
    // A padded row sees nothing; its results are zeros like those of any such row.
    if (x.rows[i].n >= valid_queries(a, t.b)) x.rows[i].limit = 0;
    t.keys = max64(t.keys, x.rows[i].limit);
  }
  return t;
}

// touch(g, m, key row, value row) for the keys [m0, m0 + here) of all heads, in memory order.
template <class Touch>
MMFAST_INLINE void few_each_key(const CrossAttentionArgs& a, const FewTask& t,
                                const mmfast::Strided& x, int64_t width, int64_t m0, int64_t here,
                                const Touch& touch) {
  for (int64_t m = m0; m < m0 + here; ++m)
    for (int64_t g = 0; g < t.heads; ++g) {
      const int64_t at = x.offset(t.b, t.g0 + g, m);
      if (m + kFewAhead < a.M)
        prefetch_row(byte_offset(static_cast<const void*>(x.data), x.dtype, at + kFewAhead * x.sn),
                     x.dtype, width);
      touch(g, m - m0, byte_offset(x.data, x.dtype, at));
    }
}

template <class S, int R, class C>
MMFAST_NOINLINE void few_fwd(const CrossAttentionArgs& a, int64_t task, void* base) {
  using Acc = typename S::Acc;
  const FewScratch<Acc> x(a, base);
  const FewTask t = few_task(a, task, R, x);
  const int64_t count = t.heads * R;
  const bool check_seen = has_conditions(a);
  for (int64_t i = 0; i < count; ++i) {
    const Row& row = x.rows[i];
    if (has_query(a, row.b, row.n))
      read_row<S>(byte_offset(a.q.data, a.q.dtype, a.q.offset(row.b, row.h, row.n)),
                  x.q + i * x.d_cols, a.D, x.d_cols);
    else
      memset(x.q + i * x.d_cols, 0, size_t(x.d_cols) * sizeof(Acc));
    x.top[i] = Acc(-__builtin_inf());
    x.sum[i] = 0;
  }
  memset(x.o, 0, size_t(count * x.v_cols) * sizeof(Acc));
  for (int64_t m0 = 0; m0 < t.keys; m0 += kFewKeys) {
    const int64_t here = min64(kFewKeys, t.keys - m0);
    const int64_t cols = round_up(here, column_align<Acc>());
    few_each_key(a, t, a.k, a.D, m0, here, [&](int64_t g, int64_t c, const void* k) {
      dots<S, R>(x.q + g * R * x.d_cols, x.d_cols, k, a.D, x.s + g * R * kFewKeys + c, kFewKeys);
    });
    if (plain_scores(a))
      softmax_strip<Acc, true>(a, x.rows, count, x.s, kFewKeys, m0, cols, x.top, x.sum, x.alpha,
                               x.offset, x.keep);
    else
      softmax_strip<Acc, false>(a, x.rows, count, x.s, kFewKeys, m0, cols, x.top, x.sum, x.alpha,
                                x.offset, x.keep);
    for (int64_t g = 0; g < t.heads && check_seen; ++g)
      seen_keys<Acc>(a, x.rows + g * R, R, m0, cols, x.seen + g * kFewKeys);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < x.v_cols; d += lanes<Acc>())
        store(x.o + i * x.v_cols + d, load(x.o + i * x.v_cols + d) * x.alpha[i]);
    few_each_key(a, t, a.v, a.Dv, m0, here, [&](int64_t g, int64_t c, const void* v) {
      if (!check_seen || x.seen[g * kFewKeys + c])
        add_scaled<S, R>(x.o + g * R * x.v_cols, x.v_cols, x.s + g * R * kFewKeys + c, kFewKeys, v,
                         a.Dv);
    });
  }
  finish_strip<Acc>(a, x.rows, count, x.o, x.v_cols, x.top, x.sum);
}

template <class S, int R, class C>
MMFAST_NOINLINE void few_bwd(const CrossAttentionArgs& a, int64_t task, void* base) {
  using Acc = typename S::Acc;
  constexpr int L = lanes<Acc>();
  const FewScratch<Acc> x(a, base);
  const int64_t chunk = task % a.key_chunks;
  FewTask t = few_task(a, task / a.key_chunks, R, x);
  const int64_t count = t.heads * R;
  const bool has_dout = a.dout.data != nullptr, plain = plain_scores(a);
  const int64_t begin = min64(chunk * a.chunk_keys, a.M);
  const int64_t end = min64(begin + a.chunk_keys, stored_keys(a, t.b));
  const int64_t live_end = max64(min64(end, t.keys), begin);
  for (int64_t g = t.g0; g < t.g0 + t.heads; ++g) {
    zero_rows(a.dk, t.b, g, live_end, end, a.D);
    zero_rows(a.dv, t.b, g, live_end, end, a.Dv);
  }
  for (int64_t i = 0; i < count; ++i) {
    const Row& row = x.rows[i];
    x.offset[i] = exponent_offset<Acc>(a, row.b, row.h, row.n);
    x.delta[i] = row_delta<C>(a, row);
    const bool blind = x.offset[i] == Acc(__builtin_inf());
    const auto read = [&](const mmfast::Strided& m, Acc* to, int64_t width, int64_t cols) {
      if (blind)
        memset(to, 0, size_t(cols) * sizeof(Acc));
      else
        read_row<Acc>(
            m.dtype,
            byte_offset(static_cast<const void*>(m.data), m.dtype, m.offset(row.b, row.h, row.n)),
            to, width, cols);
    };
    read(a.q, x.q + i * x.d_cols, a.D, x.d_cols);
    if (has_dout) read(a.dout, x.dout + i * x.v_cols, a.Dv, x.v_cols);
  }
  memset(x.dq, 0, size_t(count * x.d_cols) * sizeof(Acc));
  const bool stream_dk = can_stream(a.dk, a.B * a.G * a.M, a.D);
  const bool stream_dv = has_dout && can_stream(a.dv, a.B * a.G * a.M, a.Dv);
  for (int64_t m0 = begin; m0 < live_end; m0 += kFewKeys) {
    const int64_t here = min64(kFewKeys, live_end - m0);
    const int64_t cols = round_up(here, column_align<Acc>());
    memset(x.dp, 0, size_t(count * kFewKeys) * sizeof(Acc));
    few_each_key(a, t, a.k, a.D, m0, here, [&](int64_t g, int64_t c, const void* k) {
      dots<S, R>(x.q + g * R * x.d_cols, x.d_cols, k, a.D, x.s + g * R * kFewKeys + c, kFewKeys);
    });
    if (has_dout)
      few_each_key(a, t, a.v, a.Dv, m0, here, [&](int64_t g, int64_t c, const void* v) {
        dots<S, R>(x.dout + g * R * x.v_cols, x.v_cols, v, a.Dv, x.dp + g * R * kFewKeys + c,
                   kFewKeys);
      });
    for (int64_t i = 0; i < count; ++i) {
      Acc *s = x.s + i * kFewKeys, *ds = x.dp + i * kFewKeys;
      if (plain)
        gradient_step<Acc, true>(a, x.rows[i], s, ds, m0, here, cols, x.offset[i], x.delta[i],
                                 x.keep);
      else
        gradient_step<Acc, false>(a, x.rows[i], s, ds, m0, here, cols, x.offset[i], x.delta[i],
                                  x.keep);
      collect_row<Acc>(a, x.rows[i], ds, m0, here, cols, chunk);
      for (int64_t c = 0; c < cols; c += L) store(ds + c, load(ds + c) * Acc(a.scale));
    }
    few_each_key(a, t, a.k, a.D, m0, here, [&](int64_t g, int64_t c, const void* k) {
      const Acc *p = x.s + g * R * kFewKeys + c, *ds = x.dp + g * R * kFewKeys + c;
      bool met = false;  // a key that no row gives weight to may hold anything
      for (int r = 0; r < R; ++r) met |= p[r * kFewKeys] != 0 || ds[r * kFewKeys] != 0;
      if (!met) {
        zero_rows(a.dk, t.b, t.g0 + g, m0 + c, m0 + c + 1, a.D);
        zero_rows(a.dv, t.b, t.g0 + g, m0 + c, m0 + c + 1, a.Dv);
        return;
      }
      add_scaled<S, R>(x.dq + g * R * x.d_cols, x.d_cols, ds, kFewKeys, k, a.D);
      const auto at = [&](const mmfast::Strided& m) {
        return byte_offset(m.data, m.dtype, m.offset(t.b, t.g0 + g, m0 + c));
      };
      store_mix<S, R>(at(a.dk), x.q + g * R * x.d_cols, x.d_cols, ds, kFewKeys, a.D, stream_dk);
      if (has_dout)
        store_mix<S, R>(at(a.dv), x.dout + g * R * x.v_cols, x.v_cols, p, kFewKeys, a.Dv,
                        stream_dv);
    });
  }
  streams_done();
  for (int64_t i = 0; i < count; ++i) {
    if (a.dq_acc == nullptr && !has_query(a, t.b, x.rows[i].n)) continue;
    const Acc* from = x.dq + i * x.d_cols;
    if (dq_written_once(a))
      write_row<Acc>(a.dq.dtype, dq_storage(a, x.rows[i]), from, a.D, Acc(1));
    else
      memcpy(dq_row<Acc>(a, x.rows[i], chunk), from, size_t(a.D) * sizeof(Acc));
  }
}

#define MMFAST_FEW(pass)                                  \
  WithStore<typename C::Acc>::call(a.dtype, [&](auto s) { \
    using S = decltype(s);                                \
    switch (a.H / a.G * a.N) {                            \
      case 1:                                             \
        return pass<S, 1, C>(a, task, scratch);           \
      case 2:                                             \
        return pass<S, 2, C>(a, task, scratch);           \
      case 3:                                             \
        return pass<S, 3, C>(a, task, scratch);           \
      default:                                            \
        return pass<S, 4, C>(a, task, scratch);           \
    }                                                     \
  })

template <class C>
void few_fwd_run(const CrossAttentionArgs& a, int64_t task, void* scratch) {
  MMFAST_FEW(few_fwd);
}
template <class C>
void few_bwd_run(const CrossAttentionArgs& a, int64_t task, void* scratch) {
  MMFAST_FEW(few_bwd);
}
#undef MMFAST_FEW

// ---- the passes of the table, by the number of rows --------------------------------------------

template <class C>
int64_t any_fwd_tasks(const CrossAttentionArgs& a) {
  return few_rows(a) ? a.B * few_head_blocks(a) : fwd_tasks<C>(a);
}
template <class C>
int64_t any_fwd_scratch(const CrossAttentionArgs& a) {
  return few_rows(a) ? FewScratch<typename C::Acc>(a, nullptr).bytes : fwd_scratch<C>(a);
}
template <class C>
void any_fwd_run(const CrossAttentionArgs& a, int64_t task, void* scratch) {
  if (few_rows(a))
    few_fwd_run<C>(a, task, scratch);
  else
    fwd_run<C>(a, task, scratch);
}
template <class C>
int64_t any_bwd_tasks(const CrossAttentionArgs& a) {
  return few_rows(a) ? a.B * few_head_blocks(a) * a.key_chunks : bwd_tasks<C>(a);
}
template <class C>
int64_t any_bwd_scratch(const CrossAttentionArgs& a) {
  return few_rows(a) ? FewScratch<typename C::Acc>(a, nullptr).bytes : bwd_scratch<C>(a);
}
template <class C>
void any_bwd_run(const CrossAttentionArgs& a, int64_t task, void* scratch) {
  if (few_rows(a))
    few_bwd_run<C>(a, task, scratch);
  else
    bwd_run<C>(a, task, scratch);
}

}  // namespace
