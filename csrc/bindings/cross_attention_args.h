// The arguments of cross_attention's ops -> CrossAttentionProblem, for every backend. Shapes and
// dtypes are checked by the Python op; what is checked here again is only what would be unsafe.
#pragma once
#include <string>

#include "../common/cross_attention_problem.h"
#include "tensor.h"

namespace mmfast {

inline void require_attention(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("mmfast::cross_attention: ") + what);
}

// What every op of cross_attention is given of who may see whom.
struct AttentionConditions {
  const OptionalTensor &kv_lens, &q_lens, &q_segments, &kv_segments, &mask, &bias;
  double scale;
  bool is_causal;
  int64_t segment_rule;
};

inline const int32_t* attention_ints(const OptionalTensor& t, int64_t count, const char* what) {
  if (!t.has_value()) return nullptr;
  require_attention(
      t->scalar_type() == ScalarType::Int && t->numel() == count && t->is_contiguous(), what);
  return static_cast<const int32_t*>(t->data_ptr());
}

// Whether rows can be read one after the other.
inline bool dense_rows(const Tensor& t) {
  return t.sizes()[3] <= 1 || t.strides()[3] == 1 || t.numel() == 0;
}

inline void set_queries_and_keys(CrossAttentionProblem& a, const Tensor& q, const Tensor& k,
                                 const AttentionConditions& o) {
  require_attention(q.dim() == 4 && k.dim() == 4, "q and k must have 4 dims");
  const auto qs = q.sizes(), ks = k.sizes();
  a.B = qs[0], a.H = qs[1], a.N = qs[2], a.D = qs[3];
  a.G = ks[1], a.M = ks[2];
  require_attention(ks[0] == a.B && ks[3] == a.D, "k must have the batch and the head width of q");
  require_attention(a.G == 0 ? a.H == 0 : a.H % a.G == 0, "H must be a multiple of G");
  if (a.G == 0) a.G = 1;
  a.dtype = dtype_of(q);
  require_attention(dtype_of(k) == a.dtype, "q and k must have the same dtype");
  require_attention(dense_rows(q) && dense_rows(k), "the last dim of q and k must be dense");
  a.q = strided(q);
  a.k = strided(k);
  a.kv_lens = attention_ints(o.kv_lens, a.B, "kv_lens must be contiguous int32 [B]");
  a.q_lens = attention_ints(o.q_lens, a.B, "q_lens must be contiguous int32 [B]");
  a.q_segments =
      attention_ints(o.q_segments, a.B * a.N, "q_segments must be contiguous int32 [B, N]");
  a.kv_segments =
      attention_ints(o.kv_segments, a.B * a.M, "kv_segments must be contiguous int32 [B, M]");
  // Not by pointers: an empty tensor has none.
  require_attention(o.q_segments.has_value() == o.kv_segments.has_value(),
                    "segments come in pairs");
  a.segments_at_most = o.segment_rule == 1;
  a.is_causal = o.is_causal;
  a.scale = o.scale;
  const auto fits = [&](const Tensor& t) {
    if (t.dim() != 4) return false;
    const auto s = t.sizes();
    return (s[0] == 1 || s[0] == a.B) && (s[1] == 1 || s[1] == a.H) && (s[2] == 1 || s[2] == a.N) &&
           (s[3] == 1 || s[3] == a.M) && (s[3] == 1 || t.strides()[3] == 1);
  };
  if (o.mask.has_value() && o.mask->numel() > 0) {
    require_attention(o.mask->scalar_type() == ScalarType::Bool && fits(*o.mask),
                      "mask does not broadcast");
    a.mask = broadcast(*o.mask, DType::F32);
  }
  if (o.bias.has_value() && o.bias->numel() > 0) {
    require_attention(fits(*o.bias), "bias does not broadcast");
    a.bias = broadcast(*o.bias, dtype_of(*o.bias));
  }
}

inline void set_values(CrossAttentionProblem& a, const Tensor& v, const OptionalTensor& gate,
                       const OptionalTensor& seed, double dropout_p) {
  require_attention(v.dim() == 4, "v must have 4 dims");
  const auto vs = v.sizes();
  require_attention(vs[0] == a.B && vs[2] == a.M && dtype_of(v) == a.dtype && dense_rows(v),
                    "v must go with k");
  a.Dv = vs[3];
  a.v = strided(v);
  if (gate.has_value()) {
    const auto s = gate->sizes();
    const auto strides = gate->strides();
    require_attention((gate->dim() == 3 || (gate->dim() == 4 && s[3] == a.Dv)) && s[0] == a.B &&
                          s[1] == a.N && s[2] == a.H,
                      "gate must be [B, N, H] or [B, N, H, Dv]");
    // A logit per channel of width 1 is a logit per head.
    const bool wide = gate->dim() == 4 && a.Dv > 1;
    require_attention(!wide || strides[3] == 1, "the last dim of gate must be dense");
    a.gate = {gate->data_ptr(), strides[0], strides[2], strides[1], wide ? 1 : 0, dtype_of(*gate)};
  }
  if (dropout_p > 0) {
    require_attention(
        seed.has_value() && seed->numel() >= 1 && seed->scalar_type() == ScalarType::Long,
        "dropout needs an int64 seed");
    a.seed = static_cast<const int64_t*>(seed->data_ptr());
    const double threshold = dropout_p * 4294967296.0;
    a.drop_threshold = threshold >= 4294967295.0 ? 4294967295u : uint32_t(threshold);
    a.keep_scale = 1.0 / (1.0 - dropout_p);
  }
}

inline void require_widths(const CrossAttentionProblem& a, int64_t widest) {
  const int64_t width = a.D > widest ? a.D : a.Dv;
  if (width <= widest) return;
  const std::string what =
      "head widths go up to " + std::to_string(widest) + " here; one is " + std::to_string(width);
  require_attention(false, what.c_str());
}

inline void require_lse(const CrossAttentionProblem& a, const Tensor& lse) {
  require_attention(lse.is_contiguous() && lse.numel() == a.B * a.H * a.N &&
                        dtype_of(lse) == accumulate_dtype(a.dtype),
                    "lse must be contiguous [B, H, N]");
}

}  // namespace mmfast
