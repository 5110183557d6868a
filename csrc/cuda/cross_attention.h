// The CUDA side of cross_attention as the bindings see it: plain C++17, raw pointers on the device.
//
// Every function enqueues its kernels on the stream and returns. Results are written whole, zeros
// where a row or a key takes no part, except for what is said below. Where a pass needs memory of
// its own its `_workspace` says how many bytes (0: none, and the pointer may be null); it is
// 64-byte aligned, not initialised, and may be used by others once the call's kernels have run.
//
// What the callers see to: B, H and N are at least 1; M too, but for the forward, which writes
// zeros and LSEs of -inf where there are no keys. Sizes are at most kLargestSize, head widths
// kWidestHead. A grid that would be too large is refused with a sentence.
#pragma once
#include "attention_args.h"
#include "stream.h"

namespace mmfast {

constexpr int32_t kWidestHead = 256;          // of D and of Dv
constexpr int32_t kLargestSize = 0x7fff0000;  // of B, H, N, M: a tile more still fits int32

// out and lse.
int64_t cross_attention_fwd_workspace(const AttentionArgs& a, const Stream& stream);
void cross_attention_fwd(const AttentionArgs& a, void* workspace, const Stream& stream);

// dq, dk, dv, and where they are there dbias and dgate, of `dout`, `out`, `dlse` (may be null) and
// `lse`. `delta` and, where there is a gate, `dout_gated` are memory of the caller.
int64_t cross_attention_bwd_workspace(const AttentionArgs& a, const Stream& stream);
void cross_attention_bwd(const AttentionArgs& a, void* workspace, const Stream& stream);

// dq, dk, dlse_out and where it is there dbias, of `dimportance` and `dweights` (either may be
// null). v, out, dout, delta are absent.
int64_t cross_attention_probs_bwd_workspace(const AttentionArgs& a, const Stream& stream);
void cross_attention_probs_bwd(const AttentionArgs& a, void* workspace, const Stream& stream);

// `importance` and `weights` of `lse`.
int64_t cross_attention_importance_workspace(const AttentionArgs& a, const Stream& stream);
void cross_attention_importance(const AttentionArgs& a, void* workspace, const Stream& stream);
int64_t cross_attention_weights_workspace(const AttentionArgs& a, const Stream& stream);
void cross_attention_weights(const AttentionArgs& a, void* workspace, const Stream& stream);

// ---- the gradient of the bias, as the two backwards divide it -----------------------------------

// Which pass owns dbias. By its strides, where a dim of size 1 has 0.
enum class BiasGradient {
  NONE,   // it is not wanted
  OWNED,  // [B, H, N, M]: the pass over queries writes dS
  ROWS,   // without keys: the pass over queries sums dS over the keys of each row, then
          // cross_attention_dbias_rows
  PAIRS   // with keys, broadcast over another dim: cross_attention_dbias_pairs
};

inline BiasGradient bias_gradient(const AttentionArgs& a) {
  if (a.dbias.data == nullptr) return BiasGradient::NONE;
  const AttentionRules& r = a.rules;
  const auto has = [](int64_t stride, int32_t size) { return stride != 0 || size == 1; };
  if (!has(a.dbias.sm, r.M)) return BiasGradient::ROWS;
  return has(a.dbias.sb, r.B) && has(a.dbias.sh, r.H) && has(a.dbias.sn, r.N) ? BiasGradient::OWNED
                                                                              : BiasGradient::PAIRS;
}

// dbias where it is PAIRS: of `dout` (gated already) and `delta`, or without a dout of
// `dimportance` and `dweights`.
int64_t cross_attention_dbias_pairs_workspace(const AttentionArgs& a, const Stream& stream);
void cross_attention_dbias_pairs(const AttentionArgs& a, void* workspace, const Stream& stream);

// dbias where it is ROWS: the sums of row_sums [B, H, N] over what the bias does not have.
void cross_attention_dbias_rows(const AttentionArgs& a, const float* row_sums,
                                const Stream& stream);

}  // namespace mmfast
