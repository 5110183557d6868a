// Rows of [n0, n1, columns] in kernels: where a block's tile is, accesses of 16 bytes or of one
// element, sums over the lanes that share a row and over the rows that share columns.
//
// T is the storage of the data: float, bf16 or f16; V is how many elements an access takes, 1 or as
// many as 16 bytes hold. Everything is computed in float.
#pragma once
#include "device.cuh"
#include "row_tiles.h"

namespace mmfast {

template <class T, bool WIDE>
constexpr int kVector = WIDE ? 16 / int(sizeof(T)) : 1;

// ---- accesses -----------------------------------------------------------------------------------

// V elements as memory holds them: one, or words of 32 bits in accesses of 16 bytes.
template <class T, int V>
struct Piece {
  static_assert(V * sizeof(T) % 16 == 0);
  static constexpr int PARTS = V * int(sizeof(T)) / 16;
  static constexpr int PER_WORD = 4 / int(sizeof(T));
  Vec4 part[PARTS];

  MMFAST_DEVICE uint32_t& word(int i) { return part[i / PER_WORD / 4].x[i / PER_WORD % 4]; }
  MMFAST_DEVICE float get(int i) const {
    const uint32_t word = part[i / PER_WORD / 4].x[i / PER_WORD % 4];
    if constexpr (sizeof(T) == 4)
      return as_float(word);
    else
      return i % 2 == 0 ? lo2<T>(word) : hi2<T>(word);
  }
};
template <class T>
struct Piece<T, 1> {
  T one;
  MMFAST_DEVICE float get(int) const { return to_float(one); }
};

template <bool ONCE, class A>
MMFAST_DEVICE A load_global_as(const A* p) {
  if constexpr (ONCE)
    return load_global_once(p);
  else if constexpr (sizeof(A) == 16)
    return load_global_whole(p);
  else
    return load_global(p);
}

// The elements at p, of which `left` are there: the others are 0 and not read. Fewer than V only at
// the end of a row. ONCE: nobody reads them again soon.
template <class T, int V, bool ONCE = false>
MMFAST_DEVICE Piece<T, V> load_piece(const T* p, int64_t left) {
  Piece<T, V> piece;
  if constexpr (V == 1) {
    piece.one = left > 0 ? load_global_as<ONCE>(p) : from_float<T>(0.0f);
  } else if (left >= V) {
#pragma unroll
    for (int i = 0; i < Piece<T, V>::PARTS; ++i)
      piece.part[i] = load_global_as<ONCE>(reinterpret_cast<const Vec4*>(p) + i);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const T x = i < left ? load_global(p + i) : from_float<T>(0.0f);
      if constexpr (sizeof(T) == 4)
        piece.word(i) = as_bits(x);
      else
        piece.word(i) = i % 2 == 0 ? x.bits : piece.word(i) | uint32_t(x.bits) << 16;
    }
  }
  return piece;
}

template <class T, int V>
MMFAST_DEVICE void load_vector(const T* p, int64_t left, float (&v)[V]) {
  const Piece<T, V> piece = load_piece<T, V>(p, left);
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = piece.get(i);
}
template <class T, int V>
MMFAST_DEVICE void load_vector(const T* p, float (&v)[V]) {
  load_vector<T, V>(p, V, v);
}

// Rounds.
template <class T, int V>
MMFAST_DEVICE void store_vector(T* p, int64_t left, const float (&v)[V]) {
  if (left < V) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < left) store_global(p + i, from_float<T>(v[i]));
  } else if constexpr (V == 1) {
    store_global(p, from_float<T>(v[0]));
  } else {
    Piece<T, V> piece;
#pragma unroll
    for (int i = 0; i < V; i += Piece<T, V>::PER_WORD) {
      if constexpr (sizeof(T) == 4)
        piece.word(i) = as_bits(v[i]);
      else
        piece.word(i) = pack2<T>(v[i], v[i + 1]);
    }
#pragma unroll
    for (int i = 0; i < Piece<T, V>::PARTS; ++i)
      store_global_whole(reinterpret_cast<Vec4*>(p) + i, piece.part[i]);
  }
}
template <class T, int V>
MMFAST_DEVICE void store_vector(T* p, const float (&v)[V]) {
  store_vector<T, V>(p, V, v);
}

// What stands beside the data is stored as the data is, or as float.
template <class T, int V>
MMFAST_DEVICE void load_side(const void* data, DType dtype, int64_t at, int64_t left,
                             float (&v)[V]) {
  if (dtype == DType::F32)
    load_vector<float, V>(static_cast<const float*>(data) + at, left, v);
  else
    load_vector<T, V>(static_cast<const T*>(data) + at, left, v);
}
template <class T, int V>
MMFAST_DEVICE void load_side(const void* data, DType dtype, int64_t at, float (&v)[V]) {
  load_side<T, V>(data, dtype, at, V, v);
}
template <class T, int V>
MMFAST_DEVICE void store_side(void* data, DType dtype, int64_t at, int64_t left,
                              const float (&v)[V]) {
  if (dtype == DType::F32)
    store_vector<float, V>(static_cast<float*>(data) + at, left, v);
  else
    store_vector<T, V>(static_cast<T*>(data) + at, left, v);
}
template <class T, int V>
MMFAST_DEVICE void store_side(void* data, DType dtype, int64_t at, const float (&v)[V]) {
  store_side<T, V>(data, dtype, at, V, v);
}

// V sums, from column c on, into a row of partial sums: [.., columns] in float, which begins at a
// multiple of 16 bytes.
template <int V>
MMFAST_DEVICE void store_partials(float* parts, int64_t row, int64_t columns, int64_t c,
                                  const float (&v)[V]) {
  float* to = parts + row * columns + c;
  const int64_t left = columns - c;
  if (V == 1 || columns % 4 == 0) {
    store_vector<float, V>(to, left, v);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < left) store_global(to + i, v[i]);
  }
}

// ---- operands -----------------------------------------------------------------------------------

MMFAST_DEVICE int64_t row_offset(const RowOperand& x, int64_t i0, int64_t i1) {
  return i0 * x.s0 + i1 * x.s1;
}
template <class T>
MMFAST_DEVICE T* row_pointer(const RowOperand& x, int64_t i0, int64_t i1, int64_t c) {
  return static_cast<T*>(x.data) + row_offset(x, i0, i1) + c;
}
// A row mask's byte; where there is no mask every row takes part.
MMFAST_DEVICE bool row_is_on(const RowOperand& mask, int64_t i0, int64_t i1) {
  return mask.data == nullptr ||
         load_global(static_cast<const uint8_t*>(mask.data) + row_offset(mask, i0, i1)) != 0;
}

// ---- tiles --------------------------------------------------------------------------------------

struct TilePlace {
  int64_t i0, n, c;  // item, row, column
};

// Where this block's tile begins. The division is of 32 bits: a grid has no more blocks.
template <int V>
MMFAST_DEVICE TilePlace first_of_tile(const RowTiles& t) {
  const uint32_t block = uint32_t(blockIdx.x), row_tile = block / t.tiles_c;
  const uint32_t item = row_tile / t.tiles_n;
  return {int64_t(item), int64_t(row_tile - item * t.tiles_n) * t.rows,
          (int64_t(block - row_tile * t.tiles_c) << t.columns_log2) * V};
}

// Vector number `i` of the tile that begins at `first`.
template <int V>
MMFAST_DEVICE TilePlace place_in_tile(const RowTiles& t, const TilePlace& first, int i) {
  const int row = i >> t.columns_log2;
  return {first.i0, first.n + row, first.c + int64_t(i - (row << t.columns_log2)) * V};
}

// ---- sums ---------------------------------------------------------------------------------------

// Floats of shared memory that team_sums needs.
template <int COUNT>
constexpr int kTeamSumFloats = COUNT * (kRowThreads / 32);

// Sums over teams of 2^lanes_log2 neighbouring threads of the block: every one of them gets the
// sums of its team. All threads of the block call it; it begins and ends with a barrier where teams
// are larger than warps.
template <int COUNT>
MMFAST_DEVICE void team_sums(float (&v)[COUNT], int lanes_log2, float* buffer) {
  const int within = lanes_log2 < 5 ? 1 << lanes_log2 : 32;
  for (int mask = within / 2; mask > 0; mask /= 2)
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] += shuffle_xor(v[i], mask);
  if (lanes_log2 <= 5) return;
  constexpr int WARPS = kRowThreads / 32;
  sync_threads();
  if (lane_id() == 0)
#pragma unroll
    for (int i = 0; i < COUNT; ++i) store_shared(buffer + i * WARPS + warp_id(), v[i]);
  sync_threads();
  const int warps = 1 << (lanes_log2 - 5), first = int(warp_id()) & ~(warps - 1);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    v[i] = 0;
    for (int w = 0; w < warps; ++w) v[i] += load_shared(buffer + i * WARPS + first + w);
  }
}

// Sums over the rows of threads of a block in which 2^columns_log2 threads lie along the columns:
// the first row of threads gets them. `buffer` holds V * kRowThreads floats. All threads of the
// block call it; it begins with a barrier.
template <int V>
MMFAST_DEVICE void sum_over_rows(float (&v)[V], int columns_log2, float* buffer) {
  for (int mask = 1 << columns_log2; mask < 32; mask *= 2)
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] += shuffle_xor(v[i], mask);
  const int step = columns_log2 < 5 ? 32 : 1 << columns_log2;
  if (step >= kRowThreads) return;
  const int thread = int(threadIdx.x);
  sync_threads();
  if (thread >= step)
#pragma unroll
    for (int i = 0; i < V; ++i) store_shared(buffer + i * kRowThreads + thread, v[i]);
  sync_threads();
  if (thread >= 1 << columns_log2) return;
  for (int other = thread + step; other < kRowThreads; other += step)
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] += load_shared(buffer + i * kRowThreads + other);
}

}  // namespace mmfast
