// The two kinds of products of the backward's passes, by a warp, over tiles in shared memory.
#pragma once
#include "tile.cuh"

namespace mmfast {

// sums[i][j] += the products of rows a_row + 16 i .. of one tile with all rows of another: scores,
// or their gradients. A fragment of B is used FRAGMENTS times.
template <class A_TILE, class B_TILE, int FRAGMENTS, int BLOCKS, class T>
MMFAST_DEVICE void multiply_rows(float (&sums)[FRAGMENTS][BLOCKS][4], const T* a_tile, int a_row,
                                 const T* b_tile) {
  static_assert(A_TILE::WIDTH == B_TILE::WIDTH && BLOCKS * 8 == B_TILE::ROWS);
  MMFAST_UNROLL
  for (int column = 0; column < A_TILE::WIDTH; column += Operand<T>::DEPTH) {
    typename Operand<T>::A a[FRAGMENTS];
    MMFAST_UNROLL
    for (int i = 0; i < FRAGMENTS; ++i) load_a<A_TILE>(a[i], a_tile, a_row + 16 * i, column);
    MMFAST_UNROLL
    for (int j = 0; j < BLOCKS; j += 2) {
      typename Operand<T>::B b;
      load_b<B_TILE>(b, b_tile, 8 * j, column);
      MMFAST_UNROLL
      for (int i = 0; i < FRAGMENTS; ++i) multiply<T>(sums[i][j], sums[i][j + 1], a[i], b);
    }
  }
}

// Zeros in what a lane holds of rows DEPTH * step ... of a tile, but for those that are seen: bits
// 2 j and 2 j + 1 of `seen` are its rows 8 j + 2 t and 8 j + 2 t + 1.
template <class T>
MMFAST_DEVICE void keep_seen(typename Operand<T>::B& b, uint32_t seen, int step) {
  MMFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t two = seen >> (2 * (2 * step + i));
      const uint32_t keep = ((two & 1) != 0 ? 0x0000ffffu : 0) | ((two & 2) != 0 ? 0xffff0000u : 0);
      b.x[i] &= keep, b.x[2 + i] &= keep;
    } else {
      const uint32_t keep = (seen >> (2 * step + i) & 1) != 0 ? 0xffffffffu : 0;
      b.big[i] &= keep, b.big[2 + i] &= keep;
      b.small[i] &= keep, b.small[2 + i] &= keep;
    }
  }
}

// sums += weights times the rows of a tile, where weights(a, i, step) gives the operands of rows
// [DEPTH * step, DEPTH * (step + 1)). SPARSE and sparse: only of rows that are `seen`.
template <class TILE, bool SPARSE, int FRAGMENTS, int COLUMNS, class T, class Weights>
MMFAST_DEVICE void add_rows(float (&sums)[FRAGMENTS][COLUMNS][4], const T* tile,
                            const Weights& weights, bool sparse = false, uint32_t seen = 0) {
  static_assert(COLUMNS * 8 == TILE::WIDTH);
  MMFAST_UNROLL
  for (int step = 0; step < TILE::ROWS / Operand<T>::DEPTH; ++step) {
    typename Operand<T>::A a[FRAGMENTS];
    MMFAST_UNROLL
    for (int i = 0; i < FRAGMENTS; ++i) weights(a[i], i, step);
    MMFAST_UNROLL
    for (int j = 0; j < COLUMNS; j += 2) {
      typename Operand<T>::B b;
      load_b_rows<TILE>(b, tile, step * Operand<T>::DEPTH, 8 * j);
      if (SPARSE && sparse) keep_seen<T>(b, seen, step);
      MMFAST_UNROLL
      for (int i = 0; i < FRAGMENTS; ++i) multiply<T>(sums[i][j], sums[i][j + 1], a[i], b);
    }
  }
}

// Writes 16 rows of a warp's sums, times `factor`: row g of them to rows[0], row g + 8 to rows[1].
// pairs: two neighbours may be written at once. `there` false: zeros are written, whatever the
// sums.
template <class OUT, int COLUMNS>
MMFAST_DEVICE void store_sums(const float (&sums)[COLUMNS][4], OUT* const (&rows)[2],
                              const bool (&there)[2], int width, bool pairs, float factor) {
  const int t = lane_id() & 3;
  MMFAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (rows[half] == nullptr) continue;
    MMFAST_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
      const int column = 8 * j + 2 * t;
      if (column >= width) continue;
      OUT* to = rows[half] + column;
      const float x = there[half] ? sums[j][2 * half] * factor : 0.0f;
      const float y = there[half] ? sums[j][2 * half + 1] * factor : 0.0f;
      if (!pairs) {
        store_global(to, from_float<OUT>(x));
        if (column + 1 < width) store_global(to + 1, from_float<OUT>(y));
      } else if constexpr (sizeof(OUT) == 2) {
        store_global(reinterpret_cast<uint32_t*>(to), pack2<OUT>(x, y));
      } else {
        store_global(reinterpret_cast<Vec2*>(to), Vec2{{as_bits(x), as_bits(y)}});
      }
    }
  }
}

}  // namespace mmfast
