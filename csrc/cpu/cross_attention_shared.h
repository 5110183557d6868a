// Attention whose keys are its values (v = None; absorbed projections: heads of the width of the
// context). A block of the context is met by all query rows of its head while it lies in the
// second-level cache: as keys by inner products of rows in memory order, as values by the outer
// products of gemm.h, and where the storage dtype allows it without a copy.
#pragma once
#include "cross_attention_bwd.h"
#include "cross_attention_shared_cut.h"

namespace {

constexpr int64_t kSharedKeys = 160;  // room for the keys of a block

// Usual keys in a block: as elements they have to stay in the cache. `times` is how much of it they
// may take, in units of what leaves room for the rows.
template <class C>
MMFAST_INLINE int64_t shared_block(const CrossAttentionArgs& a, int64_t times = 1) {
  constexpr int64_t kBytes = 384 << 10;
  const int64_t row = max64(a.D, 1) * int64_t(sizeof(typename C::E)) / C::PAIR;
  return min64(max64(times * kBytes / row / 16 * 16, 32), 128);
}
// Blocks of [begin, end), and the most keys that one of them has.
MMFAST_INLINE int64_t shared_blocks(int64_t keys, int64_t usual) {
  return max64(ceil_div(keys - usual / 8, usual), 1);
}
MMFAST_INLINE int64_t shared_block_most(int64_t usual) {
  return usual + usual / 8 + mmfast::kSharedAlign;
}
static_assert(128 + 128 / 8 + mmfast::kSharedAlign <= kSharedKeys, "a block must fit");

// ---- inner products of rows ---------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kDotRows = 6;  // of 32 registers: 24 sums, 4 keys, 1 row
#else
constexpr int kDotRows = 3;  // of 16 registers: 12 sums, 3 rows, 1 key
#endif
constexpr int kDotKeys = 4;

template <class C>
MMFAST_INLINE Vec<typename C::Acc> dot_step(Vec<typename C::Acc> acc, Vec<typename C::E> x,
                                            Vec<typename C::E> y) {
#if defined(__AVX512BF16__)
  if constexpr (C::PAIR == 2)
    return (VFloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)y);
#endif
  if constexpr (C::PAIR == 1) return acc + x * y;
  return acc;
}

// The sums of four vectors, one after the other.
template <class Acc>
MMFAST_INLINE void store_sums(Acc* to, const Vec<Acc> (&v)[4], bool add) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]),
                                   _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]));
    const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]),
                                   _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]));
    const __m512d xd = _mm512_castps_pd(x), yd = _mm512_castps_pd(y);
    const __m512 z = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(xd, yd)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(xd, yd)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    if (add) sums = _mm_add_ps(sums, _mm_loadu_ps(to));
    _mm_storeu_ps(to, sums);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Acc) == 4) {
    const __m256 x = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]);
    const __m256 y = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
    const __m256 z = _mm256_hadd_ps(x, y);
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1));
    if (add) sums = _mm_add_ps(sums, _mm_loadu_ps(to));
    _mm_storeu_ps(to, sums);
    return;
  }
#endif
  for (int j = 0; j < 4; ++j) to[j] = (add ? to[j] : Acc(0)) + reduce_add<Acc>(v[j]);
}

// s[r * ld + j] (+)= <q row r, key j>; rows are `steps` whole vectors long.
template <class C, int ROWS, int KEYS>
MMFAST_NOINLINE void dot_tile(const typename C::E* q, int64_t q_ld, const typename C::E* x,
                              int64_t x_ld, int64_t steps, typename C::Acc* s, int64_t ld,
                              bool add) {
  using E = typename C::E;
  using Acc = typename C::Acc;
  constexpr int L = lanes<Acc>();
  Vec<Acc> acc[ROWS][KEYS] = {};
  for (int64_t k = 0; k < steps; k += L) {
    // Keys to come: rows are too short for the processor to see a stream in them.
    MMFAST_UNROLL for (int j = 0; j < KEYS; ++j)
        __builtin_prefetch(x + (2 * KEYS + j) * x_ld + k, 0, 2);
#if defined(__AVX512F__)
    Vec<E> vx[KEYS];
    MMFAST_UNROLL for (int j = 0; j < KEYS; ++j) vx[j] = load(x + j * x_ld + k);
    MMFAST_UNROLL for (int r = 0; r < ROWS; ++r) {
      const Vec<E> vq = load(q + r * q_ld + k);
      MMFAST_UNROLL for (int j = 0; j < KEYS; ++j) acc[r][j] = dot_step<C>(acc[r][j], vq, vx[j]);
    }
#else
    Vec<E> vq[ROWS];
    MMFAST_UNROLL for (int r = 0; r < ROWS; ++r) vq[r] = load(q + r * q_ld + k);
    MMFAST_UNROLL for (int j = 0; j < KEYS; ++j) {
      const Vec<E> vx = load(x + j * x_ld + k);
      MMFAST_UNROLL for (int r = 0; r < ROWS; ++r) acc[r][j] = dot_step<C>(acc[r][j], vq[r], vx);
    }
#endif
  }
  MMFAST_UNROLL for (int r = 0; r < ROWS; ++r) {
    if constexpr (KEYS == 4) {
      store_sums<Acc>(s + r * ld, acc[r], add);
    } else {
      for (int j = 0; j < KEYS; ++j)
        s[r * ld + j] = (add ? s[r * ld + j] : Acc(0)) + reduce_add<Acc>(acc[r][j]);
    }
  }
}

template <class C, int ROWS>
MMFAST_INLINE void dot_strip(Rows<C> q, Rows<C> x, int64_t keys, int64_t steps, typename C::Acc* s,
                             int64_t ld, bool add) {
  int64_t j = 0;
  for (; j + kDotKeys <= keys; j += kDotKeys)
    dot_tile<C, ROWS, kDotKeys>(q.data, q.ld, x.data + j * x.ld, x.ld, steps, s + j, ld, add);
  for (; j < keys; ++j)
    dot_tile<C, ROWS, 1>(q.data, q.ld, x.data + j * x.ld, x.ld, steps, s + j, ld, add);
}

// s[rows][keys] = q x^T, a strip of rows at a time: the strip stays in the first-level cache.
template <class C>
MMFAST_NOINLINE void dot_product(Rows<C> q, int64_t rows, Rows<C> x, int64_t keys,
                                 const Widths<C>& w, typename C::Acc* s, int64_t ld) {
  constexpr int L = lanes<typename C::Acc>();
  constexpr int64_t kStripBytes = 24 << 10;
  const int64_t whole = round_up(w.steps, L), strips = ceil_div(rows, kDotRows);
  const int64_t deep =
      even_pieces(whole, kStripBytes / (kDotRows * int64_t(sizeof(typename C::E))), L);
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t r = i * rows / strips, height = (i + 1) * rows / strips - r;
    for (int64_t k = 0; k < whole; k += deep) {
      const Rows<C> qs{q.data + r * q.ld + k, q.ld}, xs{x.data + k, x.ld};
      const int64_t steps = min64(deep, whole - k);
#define MMFAST_STRIP(R)                                          \
  case R:                                                        \
    dot_strip<C, R>(qs, xs, keys, steps, s + r * ld, ld, k > 0); \
    break;
      switch (height) {
        MMFAST_STRIP(1)
        MMFAST_STRIP(2)
        MMFAST_STRIP(3)
#if defined(__AVX512F__)
        MMFAST_STRIP(4)
        MMFAST_STRIP(5)
        MMFAST_STRIP(6)
#endif
      }
#undef MMFAST_STRIP
    }
  }
}

// ---- scores -------------------------------------------------------------------------------------

// Query rows in the forms that scores are made of: rows form, and transposed where that is used.
template <class C>
struct SharedRows {
  Rows<C> rows;
  const typename C::E* transposed;
};

// Rows a power of two apart would share few sets of the cache.
template <class C>
MMFAST_INLINE int64_t shared_rows_ld(const Widths<C>& w) {
  return w.rows_ld + lanes<typename C::E>();
}

// Whether scores are inner products, or x q^T as an outer product in vectors of rows, which wastes
// what is missing to a whole vector.
template <class C>
MMFAST_INLINE bool shared_by_dots(const Widths<C>& w, int64_t rows) {
  if constexpr (reduce_align<C>() > 2) return false;  // tiles
  constexpr int64_t L = lanes<typename C::Acc>();
  const int64_t padded = round_up(rows, L);
  return rows * (w.steps + 4 * L) * 8 < padded * w.steps * (padded == L ? 9 : 8);
}

template <class C>
MMFAST_INLINE SharedRows<C> shared_pack_rows(Rows<C> rows, int64_t count, const Widths<C>& w,
                                             typename C::E* transposed) {
  if (shared_by_dots<C>(w, count)) return {rows, nullptr};
  pack_transposed<C>(rows, count, w, transposed);
  return {rows, transposed};
}

// [keys][rows] -> [rows][keys] in whole vectors; `from` has room for whole blocks.
template <class Acc>
MMFAST_INLINE void transpose_scores(const Acc* from, int64_t from_ld, int64_t keys, int64_t rows,
                                    Acc* to, int64_t ld) {
  if constexpr (sizeof(Acc) == 4) {
    constexpr int L = lanes<Acc>();
    for (int64_t r = 0; r < rows; r += L)
      for (int64_t c = 0; c < keys; c += L) {
        VUint block[L];
        MMFAST_UNROLL for (int i = 0; i < L; ++i) block[i] =
            (VUint)load(from + (c + i) * from_ld + r);
        transpose_block(block);
        for (int64_t i = 0; i < min64(L, rows - r); ++i)
          store(to + (r + i) * ld + c, (VFloat)block[i]);
      }
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < keys; ++c) to[r * ld + c] = from[c * from_ld + r];
  }
}

// s[rows][kSharedKeys] = q x^T for `here` keys; `spare` has room for kSharedKeys x whole vectors.
template <class C>
MMFAST_INLINE void shared_scores(const SharedRows<C>& q, int64_t rows, Rows<C> x, int64_t here,
                                 const Widths<C>& w, typename C::Acc* s, typename C::Acc* spare) {
  using Acc = typename C::Acc;
  if (q.transposed == nullptr) {
    dot_product<C>(q.rows, rows, x, here, w, s, kSharedKeys);
    return;
  }
  const int64_t cols = round_up(rows, lanes<Acc>());
  product<C, false>(here, cols, w.steps, x.data, x.ld, q.transposed, transposed_layout(w), spare,
                    cols, Start::ZERO, nullptr);
  transpose_scores<Acc>(spare, cols, here, rows, s, kSharedKeys);
}

// ---- the context, a block at a time -------------------------------------------------------------

template <class C>
struct ContextBlock {
  int64_t m0, here, cols, deep;
  Rows<C> rows;
};

// Keys [m0, m0 + here) of head g of item b; `seen` (null = all) leaves zeros for the others.
template <class C>
MMFAST_INLINE ContextBlock<C> context_block(const CrossAttentionArgs& a, int64_t b, int64_t g,
                                            int64_t m0, int64_t here, const uint8_t* seen,
                                            typename C::E* rows) {
  const Widths<C> w(a.D);
  ContextBlock<C> x{m0,
                    here,
                    round_up(here, column_align<typename C::Acc>()),
                    round_up(here, reduce_align<C>()),
                    {}};
  bool whole = true;
  for (int64_t i = 0; seen != nullptr && i < here; ++i) whole &= seen[i] != 0;
  x.rows = whole ? rows_of_head<C>(a.k, b, g, m0, here, w, rows)
                 : pack_rows<C>(here, here, w, a.k.dtype, rows, [&](int64_t i) -> const void* {
                     return seen[i] ? strided_row<C>(a.k, b, g, m0 + i) : nullptr;
                   });
  return x;
}

// The block as values. To be asked for after its scores: those fetch what they read ahead.
template <class C>
MMFAST_INLINE Natural<C> context_values(const ContextBlock<C>& x, const Widths<C>& w,
                                        typename C::E* spare) {
  return pack_natural<C>(x.rows, x.here, x.deep, w, spare);
}

// Least and greatest segment of rows and of keys say whether a block can be left out.
MMFAST_INLINE bool block_is_live(const CrossAttentionArgs& a, const Row* rows, int64_t count,
                                 int64_t b, int64_t m0, int64_t here) {
  bool live = false;
  for (int64_t r = 0; r < count; ++r) live |= rows[r].limit > m0;
  if (!live || a.q_segments == nullptr) return live;
  SegmentRange q, kv;
  for (int64_t r = 0; r < count; ++r) q.add(a.q_segments[b * a.N + rows[r].n]);
  for (int64_t m = m0; m < m0 + here; ++m) kv.add(a.kv_segments[b * a.M + m]);
  return segments_meet(a, q, kv);
}

}  // namespace
