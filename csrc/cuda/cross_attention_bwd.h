// The passes of cross_attention's backward, between their launcher and their instances.
//
// A pass is cut into tiles, and where those are too few for the device its sums into splits, whose
// partial sums in float32 are added in order by `add_splits_kernel`.
//
// Instances of a pass, by storage type and head width: a plain form (lengths, causality) of bf16
// and f16 for 32, 64, 96, 128; a full form (masks, segments, a bias, dropout, sums over keys,
// gradients of probabilities) of all three for 64, 128, 256. 17 in all; what is missing goes to the
// next wider, or fuller, one.
#pragma once
#include "attention_rules.cuh"
#include "cross_attention.h"

namespace mmfast {

// The sides of a pass's tile, and its blocks: 2 where dk and dv are made by blocks of their own.
struct BackwardShape {
  int32_t rows = 0, keys = 0, blocks = 1;
};

struct BackwardPass {
  AttentionArgs a;          // dout is gated already
  bool owns_dbias = false;  // the pass over queries writes all of a.dbias
  BackwardShape shape;
  QueryTiles row_tiles;
  int32_t tiles = 0;  // of a key head: of keys in the pass over keys, of rows in the other
  int32_t splits = 1;
  int32_t keys_of_split = 0;  // in the pass over queries: a multiple of a tile's keys
  // Where splits > 1: [splits, B, G, M, D] and Dv, [splits, B, H, N, D].
  float *dk = nullptr, *dv = nullptr, *dq = nullptr;
  // Sums of dS over the keys of a row: [splits, B, H, N], or null where they are not wanted.
  float* row_sums = nullptr;
};

template <class T, int WIDTH, bool FULL>
struct BackwardPasses {
  static BackwardShape keys_shape();
  static BackwardShape queries_shape();
  static void keys(const BackwardPass& pass, const Stream& stream);     // dk, dv
  static void queries(const BackwardPass& pass, const Stream& stream);  // dq, dbias, row sums
};

}  // namespace mmfast
