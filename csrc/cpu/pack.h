// Packing of rows in storage (any dtype, any row stride) into what gemm.h multiplies.
//   rows form:       [row][width / PAIR], the left operand
//   transposed form: panels of [width / PAIR][keys], the right operand of  rows x rows^T
//   natural form:    [row / PAIR][width], the right operand of  P x rows
// For PAIR = 1 the rows form and the natural form are the same memory.
#pragma once
#include "cross_attention.h"
#include "gemm.h"

namespace {

constexpr int64_t kMaxWidth = 8192;  // of a head; dispatch sends no more

// Elements of the reduced dim are padded to this many with zeros on both sides.
template <class C>
constexpr int reduce_align() {
  return C::PAIR;
}

template <class C>
struct Widths {
  int64_t width;    // D
  int64_t steps;    // elements of the reduced dim that a product visits
  int64_t rows_ld;  // elements from row to row in rows form
  int64_t cols;     // width in whole vectors: columns of the natural form and of results
  explicit Widths(int64_t d) : width(d) {
    constexpr int L = lanes<typename C::Acc>();
    cols = round_up(d, L);
    steps = round_up(d, reduce_align<C>()) / C::PAIR;
    rows_ld = round_up(steps, L);
    if (C::PAIR == 1) rows_ld = cols;
  }
};

MMFAST_INLINE void read_pairs(mmfast::DType dtype, const void* src, uint32_t* dst, int64_t count,
                              int64_t padded) {
  auto* bits = reinterpret_cast<uint16_t*>(dst);
  if (dtype == mmfast::DType::BF16) {
    memcpy(bits, src, size_t(count) * 2);
  } else {
    const auto* p = static_cast<const float*>(src);
    int64_t i = 0;
    for (; i + lanes<float>() <= count; i += lanes<float>()) store_bf16(bits + i, load(p + i));
    for (; i < count; ++i) bits[i] = mmfast::float_to_bf16(p[i]);
  }
  memset(bits + count, 0, size_t(padded * 2 - count) * 2);
}

template <class C>
MMFAST_INLINE void read_elements(mmfast::DType dtype, const void* src, typename C::E* dst,
                                 const Widths<C>& w) {
  if constexpr (C::PAIR == 2)
    read_pairs(dtype, src, dst, w.width, w.rows_ld);
  else
    read_row<typename C::Acc>(dtype, src, dst, w.width, w.rows_ld);
}

// Rows of [B, N, H, D] memory lie pages apart, which no hardware prefetcher follows: measured on
// Zen 4, a fifth of the forward was spent waiting for them.
MMFAST_INLINE void prefetch_row(const void* row, mmfast::DType dtype, int64_t width) {
  const char* p = static_cast<const char*>(row);
  const int64_t bytes = width * mmfast::dtype_bytes(dtype);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Rows form, packed or in place.
template <class C>
struct Rows {
  const typename C::E* data;
  int64_t ld;
};

template <class C>
constexpr mmfast::DType native_dtype() {
  return C::PAIR == 2                   ? mmfast::DType::BF16
         : sizeof(typename C::Acc) == 8 ? mmfast::DType::F64
                                        : mmfast::DType::F32;
}

// Whether rows of storage are rows form already, whole vectors and all.
template <class C>
MMFAST_INLINE bool usable_in_place(const mmfast::Strided& t, const Widths<C>& w) {
  using E = typename C::E;
  return t.dtype == native_dtype<C>() && w.width == w.rows_ld * C::PAIR &&
         reinterpret_cast<uintptr_t>(t.data) % sizeof(E) == 0 && t.sn % C::PAIR == 0 &&
         t.sh % C::PAIR == 0 && t.sb % C::PAIR == 0;
}

// `rows` rows into rows form; row_of(i) gives the pointer to row i, or null for a row of zeros.
template <class C, class RowOf>
MMFAST_INLINE Rows<C> pack_rows(int64_t rows, int64_t padded_rows, const Widths<C>& w,
                                mmfast::DType dtype, typename C::E* dst, const RowOf& row_of) {
  constexpr int64_t kAhead = 8;
  for (int64_t i = 0; i < padded_rows; ++i) {
    if (i + kAhead < rows) {
      const void* ahead = row_of(i + kAhead);
      if (ahead != nullptr) prefetch_row(ahead, dtype, w.width);
    }
    const void* src = i < rows ? row_of(i) : nullptr;
    if (src == nullptr)
      memset(dst + i * w.rows_ld, 0, size_t(w.rows_ld) * sizeof(typename C::E));
    else
      read_elements<C>(dtype, src, dst + i * w.rows_ld, w);
  }
  return {dst, w.rows_ld};
}

// Rows that lie apart ([B, N, H, D] memory) fall into few sets of the caches: what is read many
// times is worth a packed copy. Measured on Zen 4: the products of the backward took 1.6 times as
// long on such rows in place.
template <class C>
MMFAST_INLINE bool rows_adjoin(const mmfast::Strided& t, const Widths<C>& w) {
  return t.sn <= w.width + w.width / 2;
}

// Rows [first, first + rows) of head (b, h): in place where they can be used as they are.
template <class C>
MMFAST_INLINE Rows<C> rows_of_head(const mmfast::Strided& t, int64_t b, int64_t h, int64_t first,
                                   int64_t rows, const Widths<C>& w, typename C::E* spare) {
  const auto row = [&](int64_t i) -> const void* {
    return byte_offset(static_cast<const void*>(t.data), t.dtype, t.offset(b, h, first + i));
  };
  if (usable_in_place<C>(t, w)) return {static_cast<const typename C::E*>(row(0)), t.sn / C::PAIR};
  return pack_rows<C>(rows, rows, w, t.dtype, spare, row);
}

#if defined(__AVX512F__)
// Rows i of `v` become columns: pairs, then quadruples within 128 bits, then 128-bit blocks.
MMFAST_INLINE void transpose_block(VUint (&v)[16]) {
  __m512i t[16];
  MMFAST_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32((__m512i)v[i], (__m512i)v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32((__m512i)v[i], (__m512i)v[i + 1]);
  }
  __m512i u[16];
  MMFAST_UNROLL for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  MMFAST_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xdd);
    v[i] = (VUint)_mm512_shuffle_i32x4(a, c, 0x88);
    v[i + 4] = (VUint)_mm512_shuffle_i32x4(b, d, 0x88);
    v[i + 8] = (VUint)_mm512_shuffle_i32x4(a, c, 0xdd);
    v[i + 12] = (VUint)_mm512_shuffle_i32x4(b, d, 0xdd);
  }
}
#elif defined(__AVX2__)
MMFAST_INLINE void transpose_block(VUint (&v)[8]) {
  __m256 t[8];
  MMFAST_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  __m256 s[8];
  MMFAST_UNROLL for (int i = 0; i < 8; i += 4) {
    s[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    s[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    s[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    s[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  MMFAST_UNROLL for (int i = 0; i < 4; ++i) {
    v[i] = (VUint)_mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
    v[i + 4] = (VUint)_mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
  }
}
#else
MMFAST_INLINE void transpose_block(VUint (&v)[4]) {
  VUint t[4] = {};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) t[i][j] = v[j][i];
  for (int i = 0; i < 4; ++i) v[i] = t[i];
}
#endif

template <class C>
MMFAST_INLINE PackedLayout transposed_layout(const Widths<C>& w) {
  constexpr int64_t kPanel = kTileVectors * lanes<typename C::Acc>();
  return {w.steps * kPanel, kPanel};
}

// One vector of keys, `here` of them there, all steps.
template <class E, bool WHOLE>
MMFAST_INLINE void transpose_keys(const E* src, int64_t ld, int64_t here, int64_t steps, E* dst,
                                  int64_t dst_ld) {
  constexpr int L = lanes<E>();
  const auto* p = reinterpret_cast<const uint32_t*>(src);
  auto* q = reinterpret_cast<uint32_t*>(dst);
  for (int64_t k = 0; k < steps; k += L) {
    VUint block[L];
    MMFAST_UNROLL for (int i = 0; i < L; ++i) {
      block[i] = VUint{};
      if (WHOLE || i < here) block[i] = load(p + i * ld + k);
    }
    transpose_block(block);
    const int64_t deep = min64(L, steps - k);
    if (deep == L) {
      MMFAST_UNROLL for (int i = 0; i < L; ++i) store(q + (k + i) * dst_ld, block[i]);
    } else {
      for (int64_t i = 0; i < deep; ++i) store(q + (k + i) * dst_ld, block[i]);
    }
  }
}

// rows form -> transposed form; keys past `count` become zeros up to a whole vector.
template <class C>
MMFAST_NOINLINE void pack_transposed(Rows<C> src, int64_t count, const Widths<C>& w,
                                     typename C::E* dst) {
  using E = typename C::E;
  constexpr int L = lanes<E>();
  const PackedLayout layout = transposed_layout(w);
  for (int64_t m = 0; m < count; m += L) {
    E* panel = dst + (m / layout.ld) * layout.panel + m % layout.ld;
    const E* from = src.data + m * src.ld;
    const int64_t here = min64(L, count - m);
    if constexpr (sizeof(E) == 4) {
      if (here == L)
        transpose_keys<E, true>(from, src.ld, here, w.steps, panel, layout.ld);
      else
        transpose_keys<E, false>(from, src.ld, here, w.steps, panel, layout.ld);
    } else {
      for (int64_t k = 0; k < w.steps; ++k)
        for (int64_t j = 0; j < L; ++j)
          panel[k * layout.ld + j] = j < here ? from[j * src.ld + k] : E(0);
    }
  }
}

#if defined(__AVX512BF16__)
// Two rows of values -> one row of pairs (neighbours along the rows).
MMFAST_INLINE void interleave_rows(const uint32_t* a, const uint32_t* b, uint32_t* dst,
                                   int64_t cols) {
  VInt low, high;
  MMFAST_UNROLL for (int i = 0; i < 16; ++i) {
    low[i] = (i & 1) ? 16 + i / 2 : i / 2;
    high[i] = (i & 1) ? 24 + i / 2 : 8 + i / 2;
  }
  for (int64_t c = 0; c < cols; c += 32) {
    const VUint x = load(a + c / 2), y = load(b + c / 2);
    const __m512i even = (__m512i)((x & 0xffffu) | (y << 16));
    const __m512i odd = (__m512i)((x >> 16) | (y & 0xffff0000u));
    store(dst + c, (VUint)_mm512_permutex2var_epi32(even, (__m512i)low, odd));
    if (c + 16 < cols)
      store(dst + c + 16, (VUint)_mm512_permutex2var_epi32(even, (__m512i)high, odd));
  }
}
#endif

// A packed right operand whose reduced dim is rows: element (k, c) at data[k * ld + c].
template <class C>
struct Natural {
  const typename C::E* data;
  int64_t ld;
  PackedLayout layout() const { return {kTileVectors * lanes<typename C::Acc>(), ld}; }
};

// rows form -> natural form, with rows of zeros from `count` up to `padded`. For PAIR = 1 the rows
// form is the natural form, and `src` has to be padded already.
template <class C>
MMFAST_INLINE Natural<C> pack_natural(Rows<C> src, [[maybe_unused]] int64_t count,
                                      [[maybe_unused]] int64_t padded,
                                      [[maybe_unused]] const Widths<C>& w,
                                      [[maybe_unused]] typename C::E* dst) {
#if defined(__AVX512BF16__)
  if constexpr (C::PAIR == 2) {
    alignas(64) static const uint32_t zeros[kMaxWidth] = {};
    for (int64_t i = 0; i < padded; i += 2) {
      const uint32_t* a = i < count ? src.data + i * src.ld : zeros;
      const uint32_t* b = i + 1 < count ? src.data + (i + 1) * src.ld : zeros;
      interleave_rows(a, b, dst + i / 2 * w.cols, w.cols);
    }
    return {dst, w.cols};
  }
#endif
  return {src.data, src.ld};
}

// Probabilities (float, [rows][ld]) as the left operand of P x V: in place for PAIR = 1, else
// packed in place into the first half of each row.
template <class C>
MMFAST_INLINE void probabilities_to_elements(typename C::Acc* row, int64_t cols) {
  if constexpr (C::PAIR == 2) {
    auto* bits = reinterpret_cast<uint16_t*>(row);
    for (int64_t c = 0; c < cols; c += lanes<float>()) store_bf16(bits + c, load(row + c));
  }
}

// Two rows of float -> one row of bf16 pairs along the rows: the left operand of P^T x dO, read
// transposed.
#if defined(__AVX512BF16__)
MMFAST_INLINE void pair_rows(const float* a, const float* b, uint32_t* dst, int64_t cols) {
  for (int64_t c = 0; c < cols; c += lanes<float>()) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)load(a + c)));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)load(b + c)));
    store(dst + c, (VUint)_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#endif

}  // namespace
