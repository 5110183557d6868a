// Packing of rows in storage (any dtype, any row stride) into what gemm.h multiplies.
//   rows form:       [row][width / PAIR], the left operand
//   transposed form: panels of [width / PAIR][keys], the right operand of  rows x rows^T
//   natural form:    [row / PAIR][width], the right operand of  P x rows
// For PAIR = 1 the rows form and the natural form are the same memory.
#pragma once
#include "gemm.h"

namespace {

// Elements of the reduced dim are padded to this many with zeros on both sides.
template <class C>
constexpr int reduce_align() {
  return C::PAIR;
}

template <class C>
struct Widths {
  int64_t width;     // D
  int64_t steps;     // elements of the reduced dim that a product visits
  int64_t rows_ld;   // elements from row to row in rows form
  int64_t cols;      // width in whole vectors: columns of the natural form and of results
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

// `rows` rows into rows form; row_of(i) gives the pointer to row i, or null for a row of zeros.
template <class C, class RowOf>
MMFAST_INLINE void pack_rows(int64_t rows, int64_t padded_rows, const Widths<C>& w,
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
}

#if defined(__AVX512F__)
// Rows i of `v` become columns. Four rounds of exchanging blocks of 1, 2, 4 and 8 lanes.
MMFAST_INLINE void transpose_block(VUint (&v)[16]) {
  MMFAST_UNROLL for (int h = 1; h < 16; h *= 2) {
    VInt low, high;
    MMFAST_UNROLL for (int i = 0; i < 16; ++i) {
      low[i] = (i & h) ? 16 + i - h : i;
      high[i] = (i & h) ? 16 + i : i + h;
    }
    MMFAST_UNROLL for (int i = 0; i < 16; ++i) {
      if (i & h) continue;
      const __m512i a = (__m512i)v[i], b = (__m512i)v[i + h];
      v[i] = (VUint)_mm512_permutex2var_epi32(a, (__m512i)low, b);
      v[i + h] = (VUint)_mm512_permutex2var_epi32(a, (__m512i)high, b);
    }
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
template <class C>
MMFAST_INLINE PackedLayout natural_layout(int64_t cols) {
  return {kTileVectors * lanes<typename C::Acc>(), cols};
}

// rows form -> transposed form; keys past `rows` become zeros up to a whole vector.
template <class C>
MMFAST_NOINLINE void pack_transposed(const typename C::E* src, int64_t rows, const Widths<C>& w,
                                     typename C::E* dst) {
  using E = typename C::E;
  constexpr int L = lanes<E>();
  const PackedLayout layout = transposed_layout(w);
  for (int64_t m = 0; m < rows; m += L) {
    E* panel = dst + (m / layout.ld) * layout.panel + m % layout.ld;
    const int64_t here = min64(L, rows - m);
    for (int64_t k = 0; k < w.steps; k += L) {
      const int64_t deep = min64(L, w.steps - k);
      if constexpr (sizeof(E) == 4) {
        VUint block[L];
        const auto* p = reinterpret_cast<const uint32_t*>(src + m * w.rows_ld + k);
        if (here == L) {
          MMFAST_UNROLL for (int i = 0; i < L; ++i) block[i] = load(p + i * w.rows_ld);
        } else {
          for (int i = 0; i < L; ++i) block[i] = i < here ? load(p + i * w.rows_ld) : VUint{};
        }
        transpose_block(block);
        for (int64_t i = 0; i < deep; ++i)
          store(reinterpret_cast<uint32_t*>(panel + (k + i) * layout.ld), block[i]);
      } else {
        for (int64_t i = 0; i < deep; ++i)
          for (int64_t j = 0; j < L; ++j)
            panel[(k + i) * layout.ld + j] = j < here ? src[(m + j) * w.rows_ld + k + i] : E(0);
      }
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

// rows form -> natural form. `padded_rows` is a multiple of PAIR; rows from `rows` on are zeros in
// `src` already. Only called where PAIR > 1: otherwise the two forms are one.
template <class C>
MMFAST_INLINE void pack_natural([[maybe_unused]] const typename C::E* src,
                                [[maybe_unused]] int64_t padded_rows,
                                [[maybe_unused]] const Widths<C>& w,
                                [[maybe_unused]] typename C::E* dst) {
#if defined(__AVX512BF16__)
  if constexpr (C::PAIR == 2) {
    for (int64_t i = 0; i < padded_rows; i += 2)
      interleave_rows(src + i * w.rows_ld, src + (i + 1) * w.rows_ld, dst + i / 2 * w.cols, w.cols);
  }
#endif
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
// transposed. `dst` may be the first of the two rows.
MMFAST_INLINE void pair_rows(const float* a, const float* b, uint32_t* dst, int64_t cols) {
  for (int64_t c = 0; c < cols; c += lanes<float>())
    store(dst + c, bf16_bits(load(a + c)) | (bf16_bits(load(b + c)) << 16));
}

}  // namespace
