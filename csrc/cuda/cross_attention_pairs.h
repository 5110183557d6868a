// Between the launchers of `cross_attention_pairs` and its kernel: one sum over pairs of queries
// and keys. Plain C++17.
#pragma once
#include "attention_args.h"
#include "stream.h"

namespace mmfast {

constexpr int kPairsTile = 64;  // rows and keys of a tile

// What is summed, of P = exp(S - LSE) recomputed.
enum class PairTerm : int32_t {
  WEIGHTS,   // P
  OF_PAIRS,  // P dP, dP what came in for importance and weights
  OF_OUTPUT  // P (dP - delta), dP = dropout(dout v^T)
};

// out = factor * the sums of the term: [items, heads, N, M], or [items, heads, M] (`columns`),
// where items is B or 1 and heads is H or 1, contiguous. A block owns a tile of the result and goes
// over what the result does not have in order; `steps` tiles of pairs in all, `chunk` of them in
// each of `splits` blocks, whose results then are [splits, ...].
struct PairSums {
  AttentionArgs a;
  PairTerm term = PairTerm::WEIGHTS;
  bool columns = false;
  int32_t items = 1, heads = 1;
  float factor = 1;
  void* out = nullptr;
  DType out_dtype = DType::F32;

  // Filled in by the plan.
  int32_t tiles_n = 0, tiles_m = 0;  // of the result; tiles_n is 1 with `columns`
  int32_t loop_h = 1, loop_n = 1;    // what a block goes over; items the slowest
  int32_t steps = 0, chunk = 0, splits = 1;
};

struct bf16;
struct f16;

// Launches for data of type T: bf16, f16 or float, each in its cross_attention_pairs_T.cu.
template <class T>
void launch_pairs(const PairSums& p, const Stream& stream);

}  // namespace mmfast
