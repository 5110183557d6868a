// What the bindings, the launchers and the CUDA kernels of cross_attention agree on: raw pointers
// on the device, strides in elements. Plain C++17.
#pragma once
#include <stdint.h>

#include "../common/dtype.h"

namespace mmfast {

// [B, H or G, N or M, width]: element (b, h, n, :) at data + b*sb + h*sh + n*sn, last stride 1.
//
// Where AttentionRules has the starts of its items it is packed, [1, H or G, rows, width]: item b
// begins at row starts[b], n counts from there, and sb is 0.
// `wide`: every row begins at a multiple of 16 bytes and is a multiple of 16 bytes long.
struct AttentionTensor {
  void* data = nullptr;
  int64_t sb = 0, sh = 0, sn = 0;
  bool wide = false;
};

// [B|1, H|1, N|1, M|1]: a stride of 0 is a dim of size 1; sm is 0 or 1. data null = absent.
struct AttentionPairs {
  void* data = nullptr;
  int64_t sb = 0, sh = 0, sn = 0, sm = 0;
  DType dtype = DType::F32;  // of a bias; a mask is bytes, nonzero = may attend
};

// What decides which rows see which keys, and how the scores are made. All four ops have it.
struct AttentionRules {
  int32_t B = 0, H = 0, G = 0, N = 0, M = 0;
  int32_t heads = 1;                 // H / G query heads share a key head
  const int32_t* kv_lens = nullptr;  // [B]
  const int32_t* q_lens = nullptr;   // [B]
  // [B + 1], not falling, within the rows that there are, with lengths that are their differences;
  // null = not packed. Of k, v and their gradients; of q, out, the gate and their gradients. All
  // else, statistics among it, has N and M places for each item.
  const int32_t* kv_starts = nullptr;
  const int32_t* q_starts = nullptr;
  const int32_t* q_segments = nullptr;   // [B, N]
  const int32_t* kv_segments = nullptr;  // [B, M]
  bool segments_at_most = false;
  bool is_causal = false;
  AttentionPairs mask, bias;
  float scale = 1;                // of q k^T; it may be negative or 0
  const int64_t* seed = nullptr;  // [1] or more; null = no dropout
  uint32_t drop_threshold = 0;    // a weight is kept where its random word >= this
  float keep_scale = 1;           // 1 / (1 - p)

  // Whether keys within the length may be unseen by some row (or by all, and then hold anything).
  bool sparse() const { return mask.data != nullptr || kv_segments != nullptr; }
};

struct AttentionArgs {
  DType dtype = DType::F32;  // of q, k, v and everything not said to be float
  int32_t D = 0, Dv = 0;
  AttentionRules rules;
  int32_t q_rows = 0, kv_rows = 0;  // of packed tensors
  AttentionTensor q, k, v, out;
  float* lse = nullptr;    // [B, H, N]; natural logarithm; -inf where a row sees nothing
  AttentionPairs gate;     // element (b, h, n, dv) of the logits; sm = 0 for one logit a head
  bool gate_wide = false;  // a row of a gate with a logit a channel, as AttentionTensor::wide

  // Backward.
  AttentionTensor dout;         // the incoming gradient; already gated in the passes after `rows`
  const float* dlse = nullptr;  // [B, H, N]
  float* delta = nullptr;      // [B, H, N]: rowsum(dout * out) - dlse; null in `probs_bwd`, where 0
  AttentionTensor dout_gated;  // written by the pass over rows where there is a gate; dtype
  AttentionPairs dgate;        // written by the pass over rows; data null = no gate
  AttentionTensor dq, dk, dv;
  AttentionPairs dbias;  // strides of the result, contiguous; data null = not wanted

  // Probabilities after the fact, and their gradients.
  float* importance = nullptr;         // [B, H, M]
  AttentionTensor weights;             // (b, h, n, :) over M; sh = 0 for the mean over heads
  bool weights_mean = false;           // `weights` and `dweights` are the mean over heads
  const float* dimportance = nullptr;  // [B, H, M]
  AttentionTensor dweights;            // as weights, contiguous; data null = absent
  float* dlse_out = nullptr;           // [B, H, N]: -rowsum(dS), by `probs_bwd`
};

}  // namespace mmfast
