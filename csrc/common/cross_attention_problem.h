// What a call of cross_attention asks for, once its arguments are checked: the same for every
// backend. Results and buffers are each backend's own.
#pragma once
#include <stdint.h>

#include "strided.h"

namespace mmfast {

struct CrossAttentionProblem {
  int64_t B = 0, H = 0, G = 0, N = 0, M = 0, D = 0, Dv = 0;
  DType dtype = DType::F32;
  Strided q, k, v;
  const int32_t* kv_lens = nullptr;
  const int32_t* q_lens = nullptr;
  const int32_t* q_segments = nullptr;   // [B,N]
  const int32_t* kv_segments = nullptr;  // [B,M]
  bool segments_at_most = false;
  bool is_causal = false;
  Broadcast mask;  // bytes, nonzero = may attend
  Broadcast bias;
  Broadcast gate;                 // (b, h, n, dv); sm = 0 for one logit per head
  const int64_t* seed = nullptr;  // null = no dropout
  uint32_t drop_threshold = 0;    // an element is kept where its random word >= this
  double keep_scale = 1.0;        // 1 / (1 - p)
  double scale = 1.0;
};

}  // namespace mmfast
