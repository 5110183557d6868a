// The launchers of cross_attention's backward: the order of the passes, their instances, how they
// are cut, and what memory that takes.
#include "cross_attention_bwd.h"

#include <algorithm>
#include <stdexcept>

#include "cross_attention_outside.cuh"
#include "cross_attention_rows.cuh"

namespace mmfast {
namespace {

constexpr int32_t kBlocksOfMultiprocessor = 2;
constexpr int32_t kTilesOfSplit = 2;  // at least
constexpr int32_t kMostSplits = 32;
constexpr int64_t kAlignment = 256;

// Calls f with the passes of the smallest of these widths that is built and holds both heads.
template <class T, bool FULL, int... WIDTHS, class F>
bool choose_width(int32_t width, const F& f) {
  bool found = false;
  const auto attempt = [&](auto candidate) {
    constexpr int WIDTH = decltype(candidate)::value;
    if constexpr (width_is_built(WIDTH)) {
      if (found || width > WIDTH) return;
      found = true;
      f(BackwardPasses<T, WIDTH, FULL>());
    }
  };
  (attempt(std::integral_constant<int, WIDTHS>()), ...);
  return found;
}

template <class T, class F>
bool choose_form(int32_t width, bool full, const F& f) {
  if constexpr (sizeof(T) == 2)
    if (!full && choose_width<T, false, 32, 64, 96, 128>(width, f)) return true;
  return choose_width<T, true, 64, 128, 256>(width, f);
}

template <class F>
void choose(const AttentionArgs& a, bool full, const F& f) {
  const int32_t width = a.D > a.Dv ? a.D : a.Dv;
  const bool found = a.dtype == DType::BF16  ? choose_form<bf16>(width, full, f)
                     : a.dtype == DType::F16 ? choose_form<f16>(width, full, f)
                                             : choose_form<float>(width, full, f);
  if (!found) throw std::runtime_error("cross_attention: no kernel of this head width was built");
}

// Into how many splits a sum over `addends` tiles is cut where `blocks` blocks make one each.
int32_t splits_of(int64_t blocks, int64_t addends, const Stream& stream) {
  if (blocks == 0 || addends == 0) return 1;
  int64_t most = int64_t(stream.sms) * kBlocksOfMultiprocessor / blocks;
  if (most > addends / kTilesOfSplit) most = addends / kTilesOfSplit;
  if (most > kMostSplits) most = kMostSplits;
  if (most <= 1) return 1;
  const int64_t each = (addends + most - 1) / most;
  return int32_t((addends + each - 1) / each);
}

int64_t rounded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The two passes, and where in the workspace their partial sums are. What one pass has needed the
// next may use, but for the sums of dS over keys, which the last steps read.
struct Plan {
  BackwardPass keys, queries;
  bool full = false, row_sums = false;
  int64_t dv_at = 0;            // partial dk are at 0, and so are partial dq
  int64_t partial_sums_at = 0;  // of dS over keys, [splits, B, H, N]
  int64_t row_sums_at = 0;      // added up, where there are splits
  int64_t pairs_at = 0, size = 0;
};

int64_t ceil_of(int64_t all, int64_t one) { return (all + one - 1) / one; }

Plan make_plan(const AttentionArgs& a, bool of_output, const Stream& stream) {
  const AttentionRules& r = a.rules;
  const BiasGradient bias = bias_gradient(a);
  Plan p;
  p.row_sums = !of_output || bias == BiasGradient::ROWS;
  p.keys.a = p.queries.a = a;
  p.full = r.sparse() || r.bias.data != nullptr || r.seed != nullptr || !of_output;
  p.queries.owns_dbias = bias == BiasGradient::OWNED;
  choose(a, p.full, [&](auto passes) {
    p.keys.shape = passes.keys_shape();
    p.queries.shape = passes.queries_shape();
  });
  if (!of_output) p.keys.shape.blocks = 1;  // there is no dv

  const int64_t heads = int64_t(r.B) * r.G;
  p.keys.row_tiles = query_tiles(r.heads, r.N, p.keys.shape.rows);
  p.keys.tiles = int32_t(ceil_of(r.M, p.keys.shape.keys));
  p.keys.splits =
      splits_of(heads * p.keys.tiles * p.keys.shape.blocks, p.keys.row_tiles.count, stream);
  p.queries.row_tiles = query_tiles(r.heads, r.N, p.queries.shape.rows);
  p.queries.tiles = p.queries.row_tiles.count;
  const int64_t key_tiles = ceil_of(r.M, p.queries.shape.keys);
  p.queries.splits = splits_of(heads * p.queries.tiles, key_tiles, stream);
  p.queries.keys_of_split = int32_t(ceil_of(key_tiles, p.queries.splits)) * p.queries.shape.keys;

  const int64_t rows = int64_t(r.B) * r.H * r.N, keys = heads * r.M;
  const auto bytes = [](int64_t floats) { return rounded(floats * int64_t(sizeof(float))); };
  int64_t passes = 0;
  if (p.keys.splits > 1) {
    p.dv_at = bytes(p.keys.splits * keys * a.D);
    passes = p.dv_at + (of_output ? bytes(p.keys.splits * keys * a.Dv) : 0);
  }
  if (p.queries.splits > 1) passes = std::max(passes, bytes(p.queries.splits * rows * a.D));
  p.partial_sums_at = passes;
  p.row_sums_at = p.partial_sums_at;
  if (p.row_sums && p.queries.splits > 1) p.row_sums_at += bytes(p.queries.splits * rows);
  p.pairs_at = p.row_sums_at + (p.row_sums ? bytes(rows) : 0);
  p.size = p.pairs_at;
  if (bias == BiasGradient::PAIRS) p.size += cross_attention_dbias_pairs_workspace(a, stream);
  return p;
}

float* floats(void* workspace, int64_t at) {
  return reinterpret_cast<float*>(static_cast<char*>(workspace) + at);
}

// The passes after the one over rows.
void run_passes(const AttentionArgs& a, bool of_output, void* workspace, const Stream& stream) {
  const AttentionRules& r = a.rules;
  OutsideArgs outside;
  outside.add(of_queries(a, a.dq, a.D));
  outside.add(of_keys(a, a.dk, a.D));
  outside.add(of_keys(a, a.dv, a.Dv));
  outside.add(of_gate(a));
  clear_outside(outside, r, stream);
  Plan p = make_plan(a, of_output, stream);
  const auto sums = [&](const float* partial, int32_t splits, const AttentionTensor& result,
                        DType dtype, int32_t heads, int32_t rows, int32_t width) {
    SplitSums s;
    s.partial = partial, s.splits = splits, s.result = result, s.dtype = dtype;
    s.B = r.B, s.H = heads, s.N = rows, s.width = width;
    return s;
  };
  const auto add_keys = [&](const float* partial, const AttentionTensor& result, int32_t width) {
    SplitSums s = sums(partial, p.keys.splits, result, a.dtype, r.G, r.M, width);
    s.lens = r.kv_lens, s.starts = r.kv_starts;
    add_splits(s, stream);
  };
  if (p.keys.splits > 1) p.keys.dk = floats(workspace, 0), p.keys.dv = floats(workspace, p.dv_at);
  choose(a, p.full, [&](auto passes) { passes.keys(p.keys, stream); });
  if (p.keys.splits > 1) {
    add_keys(p.keys.dk, a.dk, a.D);
    if (of_output) add_keys(p.keys.dv, a.dv, a.Dv);
  }

  const int32_t splits = p.queries.splits;
  if (splits > 1) p.queries.dq = floats(workspace, 0);
  if (p.row_sums) p.queries.row_sums = floats(workspace, p.partial_sums_at);
  choose(a, p.full, [&](auto passes) { passes.queries(p.queries, stream); });
  if (splits > 1) {
    SplitSums s = sums(p.queries.dq, splits, a.dq, a.dtype, r.H, r.N, a.D);
    s.lens = r.q_lens, s.starts = r.q_starts;
    add_splits(s, stream);
  }

  const auto add_row_sums = [&](float* to, float factor) {
    const AttentionTensor result = {to, int64_t(r.H) * r.N, r.N, 0};
    SplitSums s = sums(p.queries.row_sums, splits, result, DType::F32, r.H, 1, r.N);
    s.factor = factor;
    add_splits(s, stream);
  };
  // P = exp(S - LSE), so that the LSE's gradient is what the scores got, with the other sign.
  if (!of_output) add_row_sums(a.dlse_out, -1.0f);
  const BiasGradient bias = bias_gradient(a);
  if (bias == BiasGradient::ROWS) {
    float* sums = floats(workspace, p.row_sums_at);
    if (splits > 1) add_row_sums(sums, 1.0f);
    cross_attention_dbias_rows(a, sums, stream);
  }
  if (bias == BiasGradient::PAIRS)
    cross_attention_dbias_pairs(a, static_cast<char*>(workspace) + p.pairs_at, stream);
}

}  // namespace

int64_t cross_attention_bwd_workspace(const AttentionArgs& a, const Stream& stream) {
  return make_plan(a, true, stream).size;
}

void cross_attention_bwd(const AttentionArgs& a, void* workspace, const Stream& stream) {
  if (a.dtype == DType::BF16)
    launch_rows<bf16>(a, stream);
  else if (a.dtype == DType::F16)
    launch_rows<f16>(a, stream);
  else
    launch_rows<float>(a, stream);
  AttentionArgs gated = a;
  if (a.gate.data != nullptr) gated.dout = a.dout_gated;
  run_passes(gated, true, workspace, stream);
}

int64_t cross_attention_probs_bwd_workspace(const AttentionArgs& a, const Stream& stream) {
  return make_plan(a, false, stream).size;
}

void cross_attention_probs_bwd(const AttentionArgs& a, void* workspace, const Stream& stream) {
  run_passes(a, false, workspace, stream);
}

}  // namespace mmfast
