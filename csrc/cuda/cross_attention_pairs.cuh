// Sums over pairs of queries and keys that have no owner among tiles of rows or of keys:
// importance, attention weights, and the gradient of a bias that has the keys' dim and is broadcast
// over another. As kernels/cross_attention_pairs.py.
//
// One kernel. A block owns 64 rows x 64 keys of the result and goes over everything that is summed,
// in order, recomputing P each time: no matrix of scores is in memory unless it is the result. Head
// widths are gone through in pieces of 128 bytes, so that one instance serves them all. A warp has
// 16 of the rows. Instances, for each of bf16, f16, float:
//   <T, false, false>  weights and importance under lengths and causality alone
//   <T, true, false>   the same under anything, and P dP
//   <T, true, true>    P (dP - delta), dP = dropout(dout v^T)
#pragma once
#include "attention_rules.cuh"
#include "cross_attention_pairs.h"
#include "launch.cuh"
#include "tile.cuh"

namespace mmfast {

constexpr int kPairsThreads = 128;
constexpr int kPairsSums = kPairsTile / 8;  // of a warp: float[4] for each 8 keys

template <class T>
using PairsPiece = Tile<T, kPairsTile, 128 / int(sizeof(T))>;

// Where a block is: the tile of pairs, and the piece of the widths, that is loaded or multiplied.
struct PairsPlace {
  int32_t step = 0, piece = 0;
  int32_t b = 0, h = 0, n = 0;  // n: of the tile's first row
  Lengths l = {};
};

struct PairsBlock {
  int32_t m = 0;                     // the first key
  int32_t tile_n = 0;                // the first tile of rows
  int32_t item = 0, head = 0;        // the first ones
  int32_t split = 0, end = 0;        // one past the last step
  int32_t pieces = 0, q_pieces = 0;  // of D and Dv, of D
};

template <class T, bool VALUES>
MMFAST_DEVICE PairsBlock pairs_block(const PairSums& p) {
  constexpr int kPiece = PairsPiece<T>::WIDTH;
  PairsBlock block;
  uint32_t i = blockIdx.x;
  block.m = int32_t(i % uint32_t(p.tiles_m)) * kPairsTile, i /= uint32_t(p.tiles_m);
  block.tile_n = int32_t(i % uint32_t(p.tiles_n)), i /= uint32_t(p.tiles_n);
  block.head = int32_t(i % uint32_t(p.heads)), i /= uint32_t(p.heads);
  block.item = int32_t(i % uint32_t(p.items));
  block.split = int32_t(i / uint32_t(p.items));
  const int32_t last = p.steps - block.split * p.chunk;
  block.end = block.split * p.chunk + (last < p.chunk ? last : p.chunk);
  block.q_pieces = (p.a.D + kPiece - 1) / kPiece;
  block.pieces = block.q_pieces + (VALUES ? (p.a.Dv + kPiece - 1) / kPiece : 0);
  return block;
}

// The tile of a step of the block.
MMFAST_DEVICE PairsPlace place_of(const PairSums& p, const PairsBlock& block, int32_t step) {
  PairsPlace place;
  const int32_t outer = step / p.loop_n;
  place.step = step;
  place.b = block.item + outer / p.loop_h;
  place.h = block.head + outer % p.loop_h;
  place.n = (block.tile_n + step % p.loop_n) * kPairsTile;
  place.l = lengths(p.a.rules, place.b);
  return place;
}

// Goes on to the first tile from `step` on in which a pair may attend by length and causality;
// false past the end of the block's work.
MMFAST_DEVICE bool find_tile(const PairSums& p, const PairsBlock& block, int32_t step,
                             PairsPlace& place) {
  for (; step < block.end; ++step) {
    place = place_of(p, block, step);
    const int32_t left = place.l.q - place.n;
    const int32_t last = place.n + (left < kPairsTile ? left : kPairsTile) - 1;
    if (left > 0 && block.m < row_end(p.a.rules, place.l, true, last)) return true;
  }
  return false;
}

// To the next piece.
MMFAST_DEVICE bool advance(const PairSums& p, const PairsBlock& block, PairsPlace& place) {
  if (++place.piece < block.pieces) return true;
  return find_tile(p, block, place.step + 1, place);
}

// One piece of the rows and of the keys of a tile: of q and k, or of dout and v. What lies beyond
// the lengths is not read.
template <class T, bool VALUES>
MMFAST_DEVICE void load_piece(const AttentionArgs& a, const PairsBlock& block,
                              const PairsPlace& place, T* rows, T* keys) {
  using PIECE = PairsPiece<T>;
  const bool values = VALUES && place.piece >= block.q_pieces;
  const AttentionTensor& left = values ? a.dout : a.q;
  const AttentionTensor& right = values ? a.v : a.k;
  const int32_t first = (values ? place.piece - block.q_pieces : place.piece) * PIECE::WIDTH;
  const int32_t width = (values ? a.Dv : a.D) - first;
  const int32_t n = start_of(a.rules.q_starts, place.b) + place.n;
  const T* q = row_of<T>(left, place.b, place.h, n) + first;
  const int32_t rows_left = place.l.q - place.n, keys_left = place.l.kv - block.m;
  copy_rows<PIECE, kPairsThreads>(
      rows, [&](int i) -> const T* { return i < rows_left ? q + i * left.sn : nullptr; }, width,
      left.wide);
  const int32_t m = start_of(a.rules.kv_starts, place.b) + block.m;
  const T* k = row_of<T>(right, place.b, place.h / a.rules.heads, m) + first;
  copy_rows<PIECE, kPairsThreads>(
      keys, [&](int i) -> const T* { return i < keys_left ? k + i * right.sn : nullptr; }, width,
      right.wide);
  cp_async_commit();
}

// sums += rows keys^T of one piece, of which `width` columns are there.
template <class T>
MMFAST_DEVICE void multiply_piece(float (&sums)[kPairsSums][4], const T* rows, const T* keys,
                                  int32_t width) {
  using PIECE = PairsPiece<T>;
  constexpr int kDepth = Operand<T>::DEPTH;
  MMFAST_UNROLL
  for (int column = 0; column < PIECE::WIDTH; column += kDepth) {
    if (column >= width) break;
    typename Operand<T>::A a;
    load_a<PIECE>(a, rows, warp_id() * 16, column);
    MMFAST_UNROLL
    for (int j = 0; j < kPairsSums; j += 2) {
      typename Operand<T>::B b;
      load_b<PIECE>(b, keys, j * 8, column);
      multiply<T>(sums[j], sums[j + 1], a, b);
    }
  }
}

// One row of a warp's tile, with its LSE in units of log 2.
struct PairsRow {
  Row row;
  float lse = 0;
};

MMFAST_DEVICE PairsRow pairs_row_of(const AttentionArgs& a, const PairsPlace& place, int32_t n) {
  const AttentionRules& rules = a.rules;
  PairsRow r;
  r.row = make_row(rules, place.l, n < rules.N, place.b, place.h, n);
  if (r.row.end == 0) return r;
  const int64_t at = (int64_t(place.b) * rules.H + place.h) * rules.N + n;
  r.lse = load_global(a.lse + at) * kLog2e;
  if (r.lse == kMinusInfinity) r.row.end = 0;  // it sees nothing
  return r;
}

// The first of a lane's two rows; the other one is 8 further.
MMFAST_DEVICE int32_t lane_row(const PairsPlace& place) {
  return place.n + warp_id() * 16 + (lane_id() >> 2);
}

// Scores become P, 0 where a row may not attend to a key, whatever the score.
template <bool FULL>
MMFAST_DEVICE void weights_of_scores(const AttentionArgs& a, const PairsBlock& block,
                                     const PairsPlace& place, float (&scores)[kPairsSums][4]) {
  const AttentionRules& rules = a.rules;
  const int32_t n = lane_row(place);
  const PairsRow two[2] = {pairs_row_of(a, place, n), pairs_row_of(a, place, n + 8)};
  const float scale = rules.scale * kLog2e;
  MMFAST_UNROLL
  for (int j = 0; j < kPairsSums; ++j) {
    MMFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const PairsRow& r = two[i >> 1];
      const int32_t m = block.m + j * 8 + (lane_id() & 3) * 2 + (i & 1);
      float exponent = scores[j][i] * scale - r.lse;
      bool allowed = m < r.row.end;
      if constexpr (FULL) {
        if (allowed) allowed = may_attend(rules, r.row, place.b, m);
        if (allowed && rules.bias.data != nullptr) exponent += bias_of(rules, r.row, m);
      }
      scores[j][i] = allowed ? exp2_approx(exponent) : 0.0f;
    }
  }
}

// total += P, or P times what came in for it. What takes no part may hold anything there: a weight
// of 0 adds nothing.
template <class T, bool FULL>
MMFAST_DEVICE void add_weights(const PairSums& p, const PairsBlock& block, const PairsPlace& place,
                               const float (&weights)[kPairsSums][4],
                               float (&total)[kPairsSums][4]) {
  const AttentionArgs& a = p.a;
  const float factor = a.weights_mean ? 1.0f / float(a.rules.H) : 1.0f;
  const int32_t first = lane_row(place);
  MMFAST_UNROLL
  for (int j = 0; j < kPairsSums; ++j) {
    MMFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      float value = weights[j][i];
      if constexpr (FULL) {
        if (p.term == PairTerm::OF_PAIRS && value != 0) {
          const int32_t n = first + (i >> 1) * 8;
          const int32_t m = block.m + j * 8 + (lane_id() & 3) * 2 + (i & 1);
          float dp = 0;
          if (a.dimportance != nullptr)
            dp = load_global(a.dimportance + (int64_t(place.b) * a.rules.H + place.h) * a.rules.M +
                             m);
          if (a.dweights.data != nullptr)
            dp += to_float(load_global(row_of<T>(a.dweights, place.b, place.h, n) + m)) * factor;
          value *= dp;
        }
      }
      total[j][i] += value;
    }
  }
}

// total += P (dP - delta), with dP = dropout(dout v^T).
MMFAST_DEVICE void add_gradients(const AttentionArgs& a, const PairsBlock& block,
                                 const PairsPlace& place, const float (&weights)[kPairsSums][4],
                                 const float (&products)[kPairsSums][4],
                                 float (&total)[kPairsSums][4]) {
  const AttentionRules& rules = a.rules;
  const bool dropout = rules.seed != nullptr;
  const uint64_t seed = dropout ? uint64_t(load_global(rules.seed)) : 0;
  float delta[2];
  Row two[2];
  MMFAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    two[half].n = lane_row(place) + half * 8, two[half].h = place.h;
    delta[half] =
        two[half].n < place.l.q
            ? load_global(a.delta + (int64_t(place.b) * rules.H + place.h) * rules.N + two[half].n)
            : 0.0f;
  }
  MMFAST_UNROLL
  for (int j = 0; j < kPairsSums; ++j) {
    uint32_t survivors = 15;
    if (dropout)
      survivors = survivors_of_rows(rules, seed, place.b, two[0], two[1], block.m + j * 8);
    MMFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float kept = (survivors >> i & 1) != 0 ? products[j][i] * rules.keep_scale : 0.0f;
      if (weights[j][i] != 0) total[j][i] += weights[j][i] * (kept - delta[i >> 1]);
    }
  }
}

// ---- results ------------------------------------------------------------------------------------

// Four numbers, aligned as four of them are.
MMFAST_DEVICE void store_four(void* data, DType dtype, int64_t i, const Vec<float, 4>& x) {
  if (dtype == DType::F32) {
    store_global(reinterpret_cast<Vec<float, 4>*>(static_cast<float*>(data) + i), x);
    return;
  }
  const bool brain = dtype == DType::BF16;
  const Vec<uint32_t, 2> packed = {
      {brain ? pack2<bf16>(x.x[0], x.x[1]) : pack2<f16>(x.x[0], x.x[1]),
       brain ? pack2<bf16>(x.x[2], x.x[3]) : pack2<f16>(x.x[2], x.x[3])}};
  store_global(reinterpret_cast<Vec<uint32_t, 2>*>(static_cast<uint16_t*>(data) + i), packed);
}

// Element (row, column) of the tile in shared memory: the 16-byte chunks of a row are turned so
// that neither the stores of sums nor the loads of rows conflict.
MMFAST_DEVICE int staged(int row, int column) {
  return row * kPairsTile + (((column >> 2) ^ ((row & 7) * 2)) << 2) + (column & 3);
}

MMFAST_DEVICE void store_tile(const PairSums& p, const PairsBlock& block, float* stage,
                              const float (&total)[kPairsSums][4]) {
  const int lane = lane_id();
  MMFAST_UNROLL
  for (int j = 0; j < kPairsSums; ++j) {
    MMFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_id() * 16 + (lane >> 2) + half * 8, column = j * 8 + (lane & 3) * 2;
      const Vec<float, 2> two = {
          {total[j][2 * half] * p.factor, total[j][2 * half + 1] * p.factor}};
      store_shared(reinterpret_cast<Vec<float, 2>*>(stage + staged(row, column)), two);
    }
  }
  sync_threads();
  const int32_t N = p.a.rules.N, M = p.a.rules.M;
  const bool aligned = M % 4 == 0;
  const int64_t matrix = (int64_t(block.split) * p.items + block.item) * p.heads + block.head;
  for (int i = int(threadIdx.x); i < kPairsTile * kPairsTile / 4; i += kPairsThreads) {
    const int row = i / (kPairsTile / 4), column = i % (kPairsTile / 4) * 4;
    const int32_t n = block.tile_n * kPairsTile + row, m = block.m + column;
    if (n >= N || m >= M) continue;
    const Vec<float, 4> four =
        load_shared(reinterpret_cast<const Vec<float, 4>*>(stage + staged(row, column)));
    const int64_t at = (matrix * N + n) * M + m;
    if (aligned) {
      store_four(p.out, p.out_dtype, at, four);
    } else {
      MMFAST_UNROLL
      for (int k = 0; k < 4; ++k)
        if (k < M - m) store_number(p.out, p.out_dtype, at + k, four.x[k]);
    }
  }
}

// The sums over the rows: of a warp's rows by exchange, of warps in their order.
MMFAST_DEVICE void store_columns(const PairSums& p, const PairsBlock& block, float* stage,
                                 const float (&total)[kPairsSums][4]) {
  const int lane = lane_id();
  MMFAST_UNROLL
  for (int j = 0; j < kPairsSums; ++j) {
    float sum[2] = {total[j][0] + total[j][2], total[j][1] + total[j][3]};
    MMFAST_UNROLL
    for (int mask = 4; mask < 32; mask *= 2) {
      sum[0] += shuffle_xor(sum[0], mask);
      sum[1] += shuffle_xor(sum[1], mask);
    }
    if (lane < 4) {
      const Vec<float, 2> two = {{sum[0], sum[1]}};
      store_shared(
          reinterpret_cast<Vec<float, 2>*>(stage + warp_id() * kPairsTile + j * 8 + lane * 2), two);
    }
  }
  sync_threads();
  const int column = int(threadIdx.x);
  const int32_t m = block.m + column, M = p.a.rules.M;
  if (column >= kPairsTile || m >= M) return;
  float sum = 0;
  MMFAST_UNROLL
  for (int warp = 0; warp < kPairsThreads / 32; ++warp)
    sum += load_shared(stage + warp * kPairsTile + column);
  const int64_t matrix = (int64_t(block.split) * p.items + block.item) * p.heads + block.head;
  store_number(p.out, p.out_dtype, matrix * M + m, sum * p.factor);
}

MMFAST_DEVICE void clear(float (&sums)[kPairsSums][4]) {
  MMFAST_UNROLL
  for (int j = 0; j < kPairsSums; ++j) {
    MMFAST_UNROLL
    for (int i = 0; i < 4; ++i) sums[j][i] = 0;
  }
}

// ---- the kernel ---------------------------------------------------------------------------------

template <class T, bool FULL, bool VALUES>
MMFAST_KERNEL(kPairsThreads, 3)
cross_attention_pairs_kernel(MMFAST_PARAM(PairSums) p) {
  using PIECE = PairsPiece<T>;
  SharedMemory shared;
  T* rows = shared.take<T>(2 * PIECE::ELEMENTS);
  T* keys = shared.take<T>(2 * PIECE::ELEMENTS);
  const PairsBlock block = pairs_block<T, VALUES>(p);
  float total[kPairsSums][4] = {}, scores[kPairsSums][4] = {};
  float products[kPairsSums][4] = {};  // unused without VALUES
  PairsPlace loading;
  bool more = find_tile(p, block, block.split * p.chunk, loading);
  if (more) load_piece<T, VALUES>(p.a, block, loading, rows, keys);
  for (int buffer = 0; more; buffer ^= 1) {
    const int32_t step = loading.step, piece = loading.piece;
    more = advance(p, block, loading);
    cp_async_wait<0>();
    sync_threads();  // this piece is there for all, and nobody multiplies the one before any more
    if (more)
      load_piece<T, VALUES>(p.a, block, loading, rows + (buffer ^ 1) * PIECE::ELEMENTS,
                            keys + (buffer ^ 1) * PIECE::ELEMENTS);
    const T* own_rows = rows + buffer * PIECE::ELEMENTS;
    const T* own_keys = keys + buffer * PIECE::ELEMENTS;
    if (!VALUES || piece < block.q_pieces) {
      multiply_piece<T>(scores, own_rows, own_keys, p.a.D - piece * PIECE::WIDTH);
      if (piece + 1 == block.q_pieces)
        weights_of_scores<FULL>(p.a, block, place_of(p, block, step), scores);
    } else {
      multiply_piece<T>(products, own_rows, own_keys,
                        p.a.Dv - (piece - block.q_pieces) * PIECE::WIDTH);
    }
    if (piece + 1 < block.pieces) continue;
    const PairsPlace place = place_of(p, block, step);
    if constexpr (VALUES)
      add_gradients(p.a, block, place, scores, products, total);
    else
      add_weights<T, FULL>(p, block, place, scores, total);
    clear(scores);
    if constexpr (VALUES) clear(products);
  }

  sync_threads();  // the tiles become the memory of the results
  float* stage = reinterpret_cast<float*>(rows);
  if (p.columns)
    store_columns(p, block, stage, total);
  else
    store_tile(p, block, stage, total);
}

template <class T>
void launch_pairs(const PairSums& p, const Stream& stream) {
  constexpr int64_t kShared = 2 * shared_bytes<T>(2 * PairsPiece<T>::ELEMENTS);
  const int64_t blocks = int64_t(p.splits) * p.items * p.heads * p.tiles_n * p.tiles_m;
  const AttentionRules& r = p.a.rules;
  const bool plain = r.mask.data == nullptr && r.bias.data == nullptr && r.kv_segments == nullptr;
  if (p.term == PairTerm::OF_OUTPUT)
    launch<cross_attention_pairs_kernel<T, true, true>>({blocks, 1, 1}, kPairsThreads, kShared,
                                                        stream, p);
  else if (p.term == PairTerm::WEIGHTS && plain)
    launch<cross_attention_pairs_kernel<T, false, false>>({blocks, 1, 1}, kPairsThreads, kShared,
                                                          stream, p);
  else
    launch<cross_attention_pairs_kernel<T, true, false>>({blocks, 1, 1}, kPairsThreads, kShared,
                                                         stream, p);
}

}  // namespace mmfast
