// The weights of fuse's modalities, of logits without channels by a block for its rows and of
// logits with channels by each thread for its own. 16-bit storage is computed in float.
//
// Softmax: a logit of -inf has weight 0, and nothing has weight where all are; +inf takes all the
// weight, several share it, and the gradient is 0; NaN of a modality that is there makes all
// weights NaN. What is absent is not read.
#pragma once
#include "fuse.h"
#include "gate_activations.cuh"
#include "rows.cuh"

namespace mmfast {

// In a table: this modality is absent. Weights are never negative.
constexpr float kAbsent = -1.0f;
constexpr float kNoLogit = -INFINITY;

MMFAST_DEVICE bool is_there(const FuseLaunch& a, int64_t i0, int64_t n, int32_t k) {
  return a.present.data == nullptr || load_global(static_cast<const uint8_t*>(a.present.data) +
                                                  row_offset(a.present, i0, n) + k) != 0;
}

// The largest logit and the sum of the exponentials of their distances from it, as logits come.
struct SoftmaxSum {
  float most = kNoLogit, sum = 0.0f;
  // What the sum so far, and any sum beside it, is multiplied by before `share` is added.
  struct Step {
    float kept, share;
  };
  MMFAST_DEVICE Step add(float logit) {
    Step step = {1.0f, 0.0f};
    if (logit == most) {
      step.share = logit == kNoLogit ? 0.0f : 1.0f;  // equal first: inf - inf is no distance
    } else if (logit > most) {
      step = {device_expf(most - logit), 1.0f};
      most = logit;
    } else if (logit != kNoLogit) {
      step.share = device_expf(logit - most);
    }
    sum = sum * step.kept + step.share;
    return step;
  }
  MMFAST_DEVICE float scale() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }
  // `scaled` is scale().
  MMFAST_DEVICE float weight(float logit, float scaled) const {
    const float share = logit == kNoLogit ? 0.0f : logit == most ? 1.0f : device_expf(logit - most);
    return share * scaled;
  }
  // Where a logit is +inf the weights are constants, unless they are NaN.
  MMFAST_DEVICE bool fixed(float weight) const { return most == INFINITY && weight == weight; }
};

// Tables of [rows, K] in shared memory for rows whose logits have no channels.
struct FuseTables {
  float* logits;
  float* weights;  // kAbsent where a modality is
  // The derivative of a weight by its logit: with the softmax the factor of (d_k - mean), 0 or NaN
  // by its own right; kAbsent where the logit's gradient is 0 whatever else is. Null in the
  // forward.
  float* slopes;
};

// Fills the tables for `rows` rows from (i0, n) on, those from n1 on as if absent. All threads of
// the block call it; it begins and ends with a barrier.
MMFAST_DEVICE void fill_tables(const FuseLaunch& a, const FuseTables& tables, int rows, int64_t i0,
                               int64_t n, int64_t end) {
  const int K = a.K, count = rows * K;
  sync_threads();
  for (int i = int(threadIdx.x); i < count; i += kRowThreads) {
    const int row = i / K, k = i - row * K;
    const bool there = n + row < end && is_there(a, i0, n + row, k);
    float logit[1] = {kNoLogit};
    if (there) {
      const int64_t step = a.mode == FuseKind::PAIR ? 0 : k * a.logits_k;
      const int64_t at = row_offset(a.logits, i0, n + row) + step;
      if (a.logits.dtype == DType::F32)
        load_vector<float, 1>(static_cast<const float*>(a.logits.data) + at, logit);
      else if (a.logits.dtype == DType::BF16)
        load_vector<bf16, 1>(static_cast<const bf16*>(a.logits.data) + at, logit);
      else
        load_vector<f16, 1>(static_cast<const f16*>(a.logits.data) + at, logit);
      if (a.mode == FuseKind::PAIR && k == 1) logit[0] = -logit[0];
    }
    store_shared(tables.logits + i, logit[0]);
    store_shared(tables.weights + i, there ? 0.0f : kAbsent);
  }
  sync_threads();
  for (int i = int(threadIdx.x); i < count; i += kRowThreads) {
    const float logit = load_shared(tables.logits + i);
    const bool there = load_shared(tables.weights + i) != kAbsent;
    float weight = kAbsent, slope = kAbsent;
    if (there && a.mode == FuseKind::SOFTMAX) {
      const int first = i / K * K;
      SoftmaxSum softmax;
      for (int k = 0; k < K; ++k) softmax.add(load_shared(tables.logits + first + k));
      weight = softmax.weight(logit, softmax.scale());
      slope = softmax.fixed(weight) ? kAbsent : weight;
    } else if (there) {
      weight = gate_sigmoid(logit);
      slope = weight * gate_sigmoid(-logit);
    }
    if (there) store_shared(tables.weights + i, weight);
    if (tables.slopes != nullptr) store_shared(tables.slopes + i, slope);
  }
  sync_threads();
}

// V logits of modality k, of which `left` are there.
template <class T, int V>
MMFAST_DEVICE void load_logits(const FuseLaunch& a, const TilePlace& at, int32_t k, int64_t left,
                               float (&logits)[V]) {
  const int64_t step = a.mode == FuseKind::PAIR ? 0 : k * a.logits_k;
  const int64_t from = row_offset(a.logits, at.i0, at.n) + step + at.c;
  load_side<T, V>(a.logits.data, a.logits.dtype, from, left, logits);
  if (a.mode == FuseKind::PAIR && k == 1)
#pragma unroll
    for (int j = 0; j < V; ++j) logits[j] = -logits[j];
}

}  // namespace mmfast
