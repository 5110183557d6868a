// gemm.h's product on AMX tiles: blocks of 32 x 32 results in four tiles. Operands are packed as
// for the AVX-512 bf16 kernels, with the reduced dim padded to whole tiles (reduce_align).
#pragma once
#include "amx_tile.h"
#include "pack.h"

namespace {

struct AMX {
  using E = uint32_t;
  using Acc = float;
  static constexpr int PAIR = 2;
};
template <>
constexpr int reduce_align<AMX>() {
  return 32;
}

constexpr int kTile = 16;

// 16 rows of memory that a tile is loaded from or stored to.
struct TileMemory {
  void* data;
  int64_t stride_bytes;
};

// Rows r0 .. r0 + 16 of the left operand at step k; what is not there is zero.
template <bool TRANSPOSED>
MMFAST_INLINE TileMemory left_tile(const uint32_t* a, int64_t lda, int64_t r0, int64_t rows,
                                   int64_t k, uint32_t* spare) {
  const int64_t here = min64(kTile, rows - r0);
  if constexpr (TRANSPOSED) {
    VUint block[kTile];
    for (int i = 0; i < kTile; ++i) {
      const uint32_t* p = a + (k + i) * lda + r0;
      block[i] = VUint{};
      if (here == kTile)
        block[i] = load(p);
      else
        memcpy(&block[i], p, size_t(here) * 4);
    }
    transpose_block(block);
    for (int i = 0; i < kTile; ++i) store(spare + i * kTile, block[i]);
    return {spare, kTile * 4};
  }
  if (here == kTile) return {const_cast<uint32_t*>(a + r0 * lda + k), lda * 4};
  for (int64_t i = 0; i < kTile; ++i)
    store(spare + i * kTile, i < here ? load(a + (r0 + i) * lda + k) : VUint{});
  return {spare, kTile * 4};
}

// What a result tile starts from.
MMFAST_INLINE TileMemory start_tile(const float* c, int64_t ldc, int64_t rows, Start start,
                                    const float* alpha, float* spare) {
  for (int64_t i = 0; i < kTile; ++i) {
    VFloat v{};
    if (start != Start::ZERO && i < rows)
      v = load(c + i * ldc) * (start == Start::SCALE_ADD ? alpha[i] : 1.0f);
    store(spare + i * kTile, v);
  }
  return {spare, kTile * 4};
}

MMFAST_INLINE void copy_tile(float* c, int64_t ldc, int64_t rows, const float* spare) {
  for (int64_t i = 0; i < min64(rows, kTile); ++i) store(c + i * ldc, load(spare + i * kTile));
}

// One block of up to 32 x 32 at row r0: tiles 0-3 are results, 4-5 left, 6-7 right.
template <bool TRANSPOSED, bool TWO_ROWS, bool TWO_COLS>
MMFAST_NOINLINE void amx_block(int64_t rows, int64_t ks, const uint32_t* a, int64_t lda, int64_t r0,
                               const uint32_t* b0, const uint32_t* b1, int64_t ldb, float* c,
                               int64_t ldc, Start start, const float* alpha) {
  alignas(64) uint32_t left[kTile * kTile];
  alignas(64) float spare[kTile * kTile];
  const int64_t low = rows - r0, high = low - kTile;
  float *c_low = c + r0 * ldc, *c_high = c_low + kTile * ldc;
  const float* f_low = alpha == nullptr ? nullptr : alpha + r0;
  const float* f_high = alpha == nullptr ? nullptr : alpha + r0 + kTile;
#define MMFAST_START(T, where, count, factors)                                 \
  {                                                                            \
    const TileMemory m = start_tile(where, ldc, count, start, factors, spare); \
    MMFAST_TILE_LOAD(T, m.data, m.stride_bytes);                               \
  }
#define MMFAST_FINISH(T, where, count)        \
  {                                           \
    if ((count) >= kTile) {                   \
      MMFAST_TILE_STORE(T, where, ldc * 4);   \
    } else {                                  \
      MMFAST_TILE_STORE(T, spare, kTile * 4); \
      copy_tile(where, ldc, count, spare);    \
    }                                         \
  }
  if (start == Start::ZERO) {
    MMFAST_TILE_ZERO(0);
    MMFAST_TILE_ZERO(1);
    MMFAST_TILE_ZERO(2);
    MMFAST_TILE_ZERO(3);
  } else {
    MMFAST_START(0, c_low, low, f_low)
    if constexpr (TWO_COLS) MMFAST_START(1, c_low + kTile, low, f_low)
    if constexpr (TWO_ROWS) MMFAST_START(2, c_high, high, f_high)
    if constexpr (TWO_ROWS && TWO_COLS) MMFAST_START(3, c_high + kTile, high, f_high)
  }
  for (int64_t k = 0; k < ks; k += kTile) {
    const TileMemory upper = left_tile<TRANSPOSED>(a, lda, r0, rows, k, left);
    MMFAST_TILE_LOAD(4, upper.data, upper.stride_bytes);
    MMFAST_TILE_LOAD(6, b0 + k * ldb, ldb * 4);
    MMFAST_TILE_DOT(0, 4, 6);
    if constexpr (TWO_COLS) {
      MMFAST_TILE_LOAD(7, b1 + k * ldb, ldb * 4);
      MMFAST_TILE_DOT(1, 4, 7);
    }
    if constexpr (TWO_ROWS) {
      const TileMemory lower = left_tile<TRANSPOSED>(a, lda, r0 + kTile, rows, k, left);
      MMFAST_TILE_LOAD(5, lower.data, lower.stride_bytes);
      MMFAST_TILE_DOT(2, 5, 6);
      if constexpr (TWO_COLS) MMFAST_TILE_DOT(3, 5, 7);
    }
  }
  MMFAST_FINISH(0, c_low, low)
  if constexpr (TWO_COLS) MMFAST_FINISH(1, c_low + kTile, low)
  if constexpr (TWO_ROWS) MMFAST_FINISH(2, c_high, high)
  if constexpr (TWO_ROWS && TWO_COLS) MMFAST_FINISH(3, c_high + kTile, high)
#undef MMFAST_START
#undef MMFAST_FINISH
}

template <bool TRANSPOSED>
MMFAST_NOINLINE void amx_product(int64_t rows, int64_t cols, int64_t ks, const uint32_t* a,
                                 int64_t lda, const uint32_t* b, PackedLayout layout, float* c,
                                 int64_t ldc, Start start, const float* alpha) {
  constexpr int64_t kPanel = kTileVectors * kTile;
  const TileScope scope;
  const auto column = [&](int64_t col) { return b + col / kPanel * layout.panel + col % kPanel; };
  for (int64_t c0 = 0; c0 < cols; c0 += 2 * kTile) {
    const bool two_cols = c0 + kTile < cols;
    const uint32_t *b0 = column(c0), *b1 = two_cols ? column(c0 + kTile) : b0;
    for (int64_t r0 = 0; r0 < rows; r0 += 2 * kTile) {
      const bool two_rows = r0 + kTile < rows;
#define MMFAST_BLOCK(R, C) \
  amx_block<TRANSPOSED, R, C>(rows, ks, a, lda, r0, b0, b1, layout.ld, c + c0, ldc, start, alpha)
      if (two_rows && two_cols)
        MMFAST_BLOCK(true, true);
      else if (two_rows)
        MMFAST_BLOCK(true, false);
      else if (two_cols)
        MMFAST_BLOCK(false, true);
      else
        MMFAST_BLOCK(false, false);
#undef MMFAST_BLOCK
    }
  }
}

template <>
inline void product<AMX, false>(int64_t rows, int64_t cols, int64_t ks, const uint32_t* a,
                                int64_t lda, const uint32_t* b, PackedLayout layout, float* c,
                                int64_t ldc, Start start, const float* alpha) {
  amx_product<false>(rows, cols, ks, a, lda, b, layout, c, ldc, start, alpha);
}
template <>
inline void product<AMX, true>(int64_t rows, int64_t cols, int64_t ks, const uint32_t* a,
                               int64_t lda, const uint32_t* b, PackedLayout layout, float* c,
                               int64_t ldc, Start start, const float* alpha) {
  amx_product<true>(rows, cols, ks, a, lda, b, layout, c, ldc, start, alpha);
}

}  // namespace
