// The forward of cross_attention as its launchers see it: which instance runs, over which tiles and
// splits. Plain C++17.
//
// Instances, for T of bf16, f16 and float:
//   plain  lengths and causality, a scale greater than 0, rows of 16-byte pieces
//          64 rows a block: widths 32 (not float), 64, 96 (not float), 128, 256
//          128 rows a block: widths 64, 96 and 128 (not float), for many rows
//   full   also masks, segments, a bias, dropout, any scale, any alignment
//          64 rows a block: widths 64, 128, 256
// A width is the larger of D and Dv, rounded up to one of these.
#pragma once
#include "attention_tiles.h"
#include "cross_attention.h"

namespace mmfast {

struct FwdArgs {
  AttentionArgs a;
  QueryTiles tiles;
  int32_t splits = 1, chunk = 0;  // of the keys: `chunk` keys a split
  float scale = 1;                // log2(e) times that of q k^T
  // Partial results [splits, B * H * N, pitch] and their LSE in units of log 2; null without
  // splits.
  float* parts = nullptr;
  float* part_lse = nullptr;
  int32_t pitch = 0;
};

struct FwdPlan {
  bool full = false, tall = false;  // tall: 128 rows a block
  int32_t width = 0;
  int32_t rows = 0, keys = 0;  // of a tile
  QueryTiles tiles;
  int32_t splits = 1, chunk = 0;
  int64_t blocks = 0;
};

// Keys of a tile. Wide heads leave registers and shared memory for few.
constexpr int fwd_keys(int element, int width) {
  if (element == 2) return width <= 128 ? 64 : 32;
  return width <= 128 ? 32 : 16;
}

FwdPlan fwd_plan(const AttentionArgs& a, const Stream& stream);

template <class T>
void cross_attention_fwd_plain(const FwdPlan& plan, const FwdArgs& args, const Stream& stream);
template <class T>
void cross_attention_fwd_full(const FwdPlan& plan, const FwdArgs& args, const Stream& stream);
void cross_attention_merge(const FwdArgs& args, const Stream& stream);

}  // namespace mmfast
