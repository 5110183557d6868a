// Tiles of rows in shared memory, and the tensor-core products of a warp over them.
//
// A tile is ROWS x WIDTH elements of T, in chunks of 16 bytes whose place in a row is
// exclusive-ored with bits of the row's number, so that the 8 rows of an 8x8 matrix lie in 8
// different groups of banks and neither ldmatrix nor the copies conflict.
//
// Products are m16n8k16 for bf16 and f16. For float they are m16n8k8 of TF32 three times: each
// operand is a big and a small TF32 number, and big*big + big*small + small*big leaves an error of
// about 2^-21 of the products, as float sums have. A warp's sums are float[4] for each 16 x 8:
// lane 4g+t has (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
#pragma once
#include "device.cuh"

namespace mmfast {

template <class T, int ROWS_, int WIDTH_>
struct Tile {
  static constexpr int ROWS = ROWS_, WIDTH = WIDTH_;
  static constexpr int PER_CHUNK = 16 / int(sizeof(T));
  static constexpr int CHUNKS = WIDTH / PER_CHUNK;  // of a row
  static constexpr int ELEMENTS = ROWS * WIDTH;
  static_assert(WIDTH % PER_CHUNK == 0 && CHUNKS % 4 == 0 && ROWS % 8 == 0, "of whole matrices");

  // How many neighbouring chunks of a row change places.
  static constexpr int TURNED = CHUNKS % 8 == 0 ? 8 : 4;

  // Index of the first element of a chunk.
  static MMFAST_HD constexpr int at(int row, int chunk) {
    const int turn = TURNED == 8 ? row & 7 : (row >> 1) & 3;
    return row * WIDTH + (chunk ^ turn) * PER_CHUNK;
  }

  // Index of what lies `rows`, a multiple of 8, further down and `chunks`, an even number, further
  // right than `index`, which is that of chunk 0 or 1 of a row. A lane has one such index, and what
  // it reads in unrolled loops is a constant or one exclusive or away.
  static MMFAST_HD constexpr int along(int index, int rows, int chunks) {
    return (index ^ ((chunks & (TURNED - 1)) * PER_CHUNK)) + (chunks & ~(TURNED - 1)) * PER_CHUNK +
           rows * WIDTH;
  }
};

// Copies rows into a tile, in 16-byte pieces that `cp_async_wait` waits for, or by plain accesses
// where rows are not aligned (`wide` false): a barrier is needed after either. `source(row)` is
// where row `row` of the tile begins in global memory, or null: a row of zeros. Elements from
// `width` on are zeros too. Nothing outside of the rows that `source` gives is read.
template <class TILE, int THREADS, class T, class Source>
MMFAST_DEVICE void copy_rows(T* tile, const Source& source, int width, bool wide) {
  for (int i = int(threadIdx.x); i < TILE::ROWS * TILE::CHUNKS; i += THREADS) {
    const int row = i / TILE::CHUNKS, chunk = i % TILE::CHUNKS;
    const int first = chunk * TILE::PER_CHUNK;
    const T* from = source(row);
    T* to = tile + TILE::at(row, chunk);
    const bool there = from != nullptr && first < width;
    if (wide) {
      cp_async16(to, there ? from + first : nullptr, there);
    } else {
      Vec<T, TILE::PER_CHUNK> piece;
      MMFAST_UNROLL
      for (int j = 0; j < TILE::PER_CHUNK; ++j)
        piece.x[j] = there && first + j < width ? load_global(from + first + j) : from_float<T>(0);
      store_shared(reinterpret_cast<Vec<T, TILE::PER_CHUNK>*>(to), piece);
    }
  }
}

// ---- operands -----------------------------------------------------------------------------------

// 16 x DEPTH of A, and DEPTH x 16 of B (two n8 tiles).
template <class T>
struct Operand {
  static constexpr int DEPTH = 16;
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[4];
  };
};

template <>
struct Operand<float> {
  static constexpr int DEPTH = 8;
  struct A {
    uint32_t big[4], small[4];
  };
  struct B {
    uint32_t big[4], small[4];
  };
};

// x = big + small to about 21 bits: big is x rounded to TF32, of small the tensor cores take as
// much. What is not finite has no small part, since inf - inf is NaN, and is not rounded, which
// would carry a NaN into its sign. In integers, because nvcc makes nine instructions of two
// cvt.rna.
MMFAST_DEVICE void split_tf32(float x, uint32_t& big, uint32_t& small) {
  const bool finite = fabsf(x) <= 3.4e38f;  // what rounds to inf is left as it is
  big = (as_bits(x) + (finite ? 0x1000u : 0u)) & 0xffffe000u;
  const float rest = x - as_float(big);
  small = finite ? as_bits(rest) : 0u;
}

// Rows and columns of what is loaded are multiples of 8 and of 2 chunks.

// A[i][k] = tile[row + i][column + k].
template <class TILE, class T>
MMFAST_DEVICE void load_a(typename Operand<T>::A& a, const T* tile, int row, int column) {
  const int lane = lane_id();
  const int own = TILE::at(lane & 15, lane >> 4);
  const T* from = tile + TILE::along(own, row, column / TILE::PER_CHUNK);
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4(a.x, from);
  } else {
    uint32_t raw[4];
    ldmatrix_x4(raw, from);
    MMFAST_UNROLL
    for (int i = 0; i < 4; ++i) split_tf32(as_float(raw[i]), a.big[i], a.small[i]);
  }
}

// B[k][j] = tile[row + j][column + k]: the rows of the tile are the columns of the product.
template <class TILE, class T>
MMFAST_DEVICE void load_b(typename Operand<T>::B& b, const T* tile, int row, int column) {
  const int lane = lane_id();
  const int own = TILE::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  const T* from = tile + TILE::along(own, row, column / TILE::PER_CHUNK);
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4(b.x, from);
  } else {
    uint32_t raw[4];
    ldmatrix_x4(raw, from);
    MMFAST_UNROLL
    for (int i = 0; i < 4; ++i) split_tf32(as_float(raw[i]), b.big[i], b.small[i]);
  }
}

// B[k][j] = tile[row + k][column + j]. For float its rows are in the order 0 2 4 6 1 3 5 7, which
// is that of `a_from_sums`: each lane then has in A what it has in the sums.
template <class TILE, class T>
MMFAST_DEVICE void load_b_rows(typename Operand<T>::B& b, const T* tile, int row, int column) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const int own = TILE::at(lane & 15, lane >> 4);
    ldmatrix_x4_trans(b.x, tile + TILE::along(own, row, column / TILE::PER_CHUNK));
  } else {
    const int g = lane >> 2, t = lane & 3;
    MMFAST_UNROLL
    for (int i = 0; i < 4; ++i) {  // b0, b1 of columns 0..7, then of columns 8..15
      const int own = TILE::at(2 * t + (i & 1), g >> 2);
      const int from = TILE::along(own, row, column / TILE::PER_CHUNK + (i >> 1) * 2);
      split_tf32(load_shared(tile + from + (g & 3)), b.big[i], b.small[i]);
    }
  }
}

// A = columns [DEPTH * step, DEPTH * (step + 1)) of a warp's 16-row sums, rounded to T.
template <class T>
MMFAST_DEVICE void a_from_sums(typename Operand<T>::A& a, const float (*sums)[4], int step) {
  if constexpr (sizeof(T) == 2) {
    const float (*c)[4] = sums + 2 * step;
    a.x[0] = pack2<T>(c[0][0], c[0][1]);
    a.x[1] = pack2<T>(c[0][2], c[0][3]);
    a.x[2] = pack2<T>(c[1][0], c[1][1]);
    a.x[3] = pack2<T>(c[1][2], c[1][3]);
  } else {
    const float* c = sums[step];
    split_tf32(c[0], a.big[0], a.small[0]);
    split_tf32(c[2], a.big[1], a.small[1]);
    split_tf32(c[1], a.big[2], a.small[2]);
    split_tf32(c[3], a.big[3], a.small[3]);
  }
}

// left, right += A B: the sums of columns 0..7 and 8..15.
template <class T>
MMFAST_DEVICE void multiply(float (&left)[4], float (&right)[4], const typename Operand<T>::A& a,
                            const typename Operand<T>::B& b) {
  if constexpr (sizeof(T) == 2) {
    mma_m16n8k16<T>(left, a.x, b.x[0], b.x[1]);
    mma_m16n8k16<T>(right, a.x, b.x[2], b.x[3]);
  } else {
    mma_m16n8k8_tf32(left, a.small, b.big[0], b.big[1]);
    mma_m16n8k8_tf32(right, a.small, b.big[2], b.big[3]);
    mma_m16n8k8_tf32(left, a.big, b.small[0], b.small[1]);
    mma_m16n8k8_tf32(right, a.big, b.small[2], b.small[3]);
    mma_m16n8k8_tf32(left, a.big, b.big[0], b.big[1]);
    mma_m16n8k8_tf32(right, a.big, b.big[2], b.big[3]);
  }
}

}  // namespace mmfast
