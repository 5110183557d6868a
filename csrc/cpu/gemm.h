// Register-tiled products of packed blocks, the one inner loop of the attention kernels:
//   C[r, c] = C[r, c] * alpha[r] + sum_k A(r, k) * B(k, c)
// Elements of A and B are 32 bits (a float, or two bf16 that are neighbours along k) or a double.
#pragma once
#include "vec.h"

namespace {

// Compute types. PAIR = how many values of the reduced dim sit in one element.
struct F32 {
  using E = float;
  using Acc = float;
  static constexpr int PAIR = 1;
  MMFAST_INLINE VFloat mac(VFloat acc, float a, VFloat b) { return acc + a * b; }
};
struct F64 {
  using E = double;
  using Acc = double;
  static constexpr int PAIR = 1;
  MMFAST_INLINE VDouble mac(VDouble acc, double a, VDouble b) { return acc + a * b; }
};
#if defined(__AVX512BF16__)
struct BF16 {
  using E = uint32_t;
  using Acc = float;
  static constexpr int PAIR = 2;
  MMFAST_INLINE VFloat mac(VFloat acc, uint32_t a, VUint b) {
    return (VFloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
};
#endif

enum class Start { ZERO, ADD, SCALE_ADD };

constexpr int kTileRows = MMFAST_TILE_ROWS;
constexpr int kTileVectors = MMFAST_TILE_VECTORS;

// TRANSPOSED: A(r, k) is a[k * lda + r], else a[r * lda + k].
template <class C, int ROWS, int VECTORS, bool TRANSPOSED>
MMFAST_INLINE void tile_product(const typename C::E* __restrict a, int64_t lda,
                                const typename C::E* __restrict b, int64_t ldb, int64_t ks,
                                typename C::Acc* __restrict c, int64_t ldc, Start start,
                                const typename C::Acc* alpha) {
  using E = typename C::E;
  using Acc = typename C::Acc;
  constexpr int L = lanes<Acc>();
  Vec<Acc> acc[ROWS][VECTORS];
  if (start == Start::ZERO) {
    MMFAST_UNROLL for (int r = 0; r < ROWS; ++r) MMFAST_UNROLL for (int j = 0; j < VECTORS; ++j)
        acc[r][j] = Vec<Acc>{};
  } else if (start == Start::ADD) {
    MMFAST_UNROLL for (int r = 0; r < ROWS; ++r) MMFAST_UNROLL for (int j = 0; j < VECTORS; ++j)
        acc[r][j] = load(c + r * ldc + j * L);
  } else {
    MMFAST_UNROLL for (int r = 0; r < ROWS; ++r) MMFAST_UNROLL for (int j = 0; j < VECTORS; ++j)
        acc[r][j] = load(c + r * ldc + j * L) * alpha[r];
  }
  for (int64_t k = 0; k < ks; ++k) {
    Vec<E> vb[VECTORS];
    MMFAST_UNROLL for (int j = 0; j < VECTORS; ++j) vb[j] = load(b + k * ldb + j * L);
    MMFAST_UNROLL for (int r = 0; r < ROWS; ++r) {
      const E x = TRANSPOSED ? a[k * lda + r] : a[r * lda + k];
      MMFAST_UNROLL for (int j = 0; j < VECTORS; ++j) acc[r][j] = C::mac(acc[r][j], x, vb[j]);
    }
  }
  MMFAST_UNROLL for (int r = 0; r < ROWS; ++r) MMFAST_UNROLL for (int j = 0; j < VECTORS; ++j)
      store(c + r * ldc + j * L, acc[r][j]);
}

template <class C, int ROWS, int VECTORS, bool TRANSPOSED>
MMFAST_NOINLINE void tile_entry(const typename C::E* a, int64_t lda, const typename C::E* b,
                                int64_t ldb, int64_t ks, typename C::Acc* c, int64_t ldc,
                                Start start, const typename C::Acc* alpha) {
  tile_product<C, ROWS, VECTORS, TRANSPOSED>(a, lda, b, ldb, ks, c, ldc, start, alpha);
}

template <class C, bool TRANSPOSED, int VECTORS>
MMFAST_INLINE void strips_of(int64_t rows, const typename C::E* a, int64_t lda,
                             const typename C::E* b, int64_t ldb, int64_t ks, typename C::Acc* c,
                             int64_t ldc, Start start, const typename C::Acc* alpha) {
  // Strips of nearly equal height: 64 rows are ten of 6 and one of 4, but 7 rows are 4 + 3.
  const int64_t strips = ceil_div(rows, kTileRows);
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t r = s * rows / strips;
    const int64_t height = (s + 1) * rows / strips - r;
    const auto* as = TRANSPOSED ? a + r : a + r * lda;
    auto* cs = c + r * ldc;
    const auto* fs = alpha == nullptr ? nullptr : alpha + r;
#define MMFAST_STRIP(R)                                                             \
  case R:                                                                           \
    tile_entry<C, R, VECTORS, TRANSPOSED>(as, lda, b, ldb, ks, cs, ldc, start, fs); \
    break;
    switch (height) {
      MMFAST_STRIP(1)
      MMFAST_STRIP(2)
      MMFAST_STRIP(3)
      MMFAST_STRIP(4)
#if MMFAST_TILE_ROWS > 4
      MMFAST_STRIP(5)
      MMFAST_STRIP(6)
#endif
    }
#undef MMFAST_STRIP
  }
}

// How a packed right-hand side lies in memory: panels of kTileVectors vectors of columns, `panel`
// elements from one panel to the next, `ld` from one k to the next.
struct PackedLayout {
  int64_t panel, ld;
};

// C[rows, cols] with cols a multiple of the vector; see the formula at the top of this file.
template <class C, bool TRANSPOSED>
MMFAST_NOINLINE void product(int64_t rows, int64_t cols, int64_t ks, const typename C::E* a,
                             int64_t lda, const typename C::E* b, PackedLayout layout,
                             typename C::Acc* c, int64_t ldc, Start start,
                             const typename C::Acc* alpha) {
  constexpr int L = lanes<typename C::Acc>();
  constexpr int kPanel = kTileVectors * L;
  for (int64_t c0 = 0; c0 < cols; c0 += kPanel) {
    const auto* bp = b + (c0 / kPanel) * layout.panel;
    const int64_t vectors = min64(kTileVectors, (cols - c0) / L);
#define MMFAST_PANEL(V)                                                                      \
  case V:                                                                                    \
    strips_of<C, TRANSPOSED, V>(rows, a, lda, bp, layout.ld, ks, c + c0, ldc, start, alpha); \
    break;
    switch (vectors) {
      MMFAST_PANEL(1)
      MMFAST_PANEL(2)
#if MMFAST_TILE_VECTORS > 2
      MMFAST_PANEL(3)
      MMFAST_PANEL(4)
#endif
    }
#undef MMFAST_PANEL
  }
}

}  // namespace
