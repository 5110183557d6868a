// Which sums over pairs the ops of cross_attention ask for, how blocks share them, and what is
// added afterwards.
#include "cross_attention_pairs.h"

#include <algorithm>
#include <stdexcept>

#include "column_sums.h"
#include "cross_attention.h"

namespace mmfast {

namespace {

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t result_size(const PairSums& p) {
  return int64_t(p.items) * p.heads * (p.columns ? 1 : p.a.rules.N) * p.a.rules.M;
}

// Where the tiles of the result are too few for the device, blocks share the work on each of them.
// By the shape and the number of multiprocessors alone, and added in order.
void plan(PairSums& p, const Stream& stream) {
  const AttentionRules& r = p.a.rules;
  const int64_t tiles_n = ceil_of(r.N, kPairsTile);
  p.tiles_n = p.columns ? 1 : int32_t(tiles_n);
  p.tiles_m = int32_t(ceil_of(r.M, kPairsTile));
  p.loop_h = p.heads == 1 ? r.H : 1;
  p.loop_n = p.columns ? int32_t(tiles_n) : 1;
  const int64_t steps = int64_t(p.items == 1 ? r.B : 1) * p.loop_h * p.loop_n;
  const int64_t blocks = int64_t(p.items) * p.heads * p.tiles_n * p.tiles_m;
  if (steps > 0x3fffffff || blocks > 0x7fffffff)
    throw std::runtime_error(
        "mmfast::cross_attention: too many tiles of pairs for one launch; "
        "split the batch");
  const int64_t wanted = std::min(steps, ceil_of(2 * int64_t(stream.sms), blocks));
  p.steps = int32_t(steps);
  p.chunk = int32_t(blocks >= stream.sms ? steps : ceil_of(steps, wanted));
  p.splits = int32_t(ceil_of(steps, p.chunk));
}

int64_t workspace_of(PairSums p, const Stream& stream) {
  plan(p, stream);
  return p.splits == 1 ? 0 : p.splits * result_size(p) * int64_t(sizeof(float));
}

void run(PairSums p, void* workspace, const Stream& stream) {
  plan(p, stream);
  ColumnSumsArgs sums;
  if (p.splits > 1) {
    sums.partials = static_cast<const float*>(workspace);
    sums.chunks = sums.group = p.splits;
    sums.columns = result_size(p);
    sums.slots = 1;
    sums.out[0] = p.out, sums.out_dtype[0] = p.out_dtype;
    p.out = workspace, p.out_dtype = DType::F32;
  }
  switch (p.a.dtype) {
    case DType::BF16:
      launch_pairs<bf16>(p, stream);
      break;
    case DType::F16:
      launch_pairs<f16>(p, stream);
      break;
    default:
      launch_pairs<float>(p, stream);
  }
  if (p.splits > 1) column_sums(sums, stream);
}

PairSums importance_sums(const AttentionArgs& a) {
  PairSums p;
  p.a = a;
  p.columns = true;
  p.items = a.rules.B, p.heads = a.rules.H;
  p.out = a.importance;
  return p;
}

PairSums weights_sums(const AttentionArgs& a) {
  PairSums p;
  p.a = a;
  p.items = a.rules.B, p.heads = a.weights_mean ? 1 : a.rules.H;
  p.factor = a.weights_mean ? 1.0f / float(a.rules.H) : 1.0f;
  p.out = a.weights.data, p.out_dtype = a.dtype;
  return p;
}

// A stride of 0 is a dim of size 1: where it is the other dim that has size 1, that is the same.
PairSums bias_sums(const AttentionArgs& a) {
  PairSums p;
  p.a = a;
  p.term = a.dout.data != nullptr ? PairTerm::OF_OUTPUT : PairTerm::OF_PAIRS;
  p.columns = a.dbias.sn == 0 && a.rules.N > 1;
  p.items = a.dbias.sb == 0 ? 1 : a.rules.B;
  p.heads = a.dbias.sh == 0 ? 1 : a.rules.H;
  p.out = a.dbias.data, p.out_dtype = a.dbias.dtype;
  return p;
}

}  // namespace

int64_t cross_attention_importance_workspace(const AttentionArgs& a, const Stream& stream) {
  return workspace_of(importance_sums(a), stream);
}
void cross_attention_importance(const AttentionArgs& a, void* workspace, const Stream& stream) {
  run(importance_sums(a), workspace, stream);
}

int64_t cross_attention_weights_workspace(const AttentionArgs& a, const Stream& stream) {
  return workspace_of(weights_sums(a), stream);
}
void cross_attention_weights(const AttentionArgs& a, void* workspace, const Stream& stream) {
  run(weights_sums(a), workspace, stream);
}

int64_t cross_attention_dbias_pairs_workspace(const AttentionArgs& a, const Stream& stream) {
  return workspace_of(bias_sums(a), stream);
}
void cross_attention_dbias_pairs(const AttentionArgs& a, void* workspace, const Stream& stream) {
  run(bias_sums(a), workspace, stream);
}

}  // namespace mmfast
