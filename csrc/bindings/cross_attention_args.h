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
  const OptionalTensor &kv_lens, &q_lens, &q_segments, &kv_segments, &mask, &bias, &q_starts,
      &kv_starts;
  double scale;
  bool is_causal;
  int64_t segment_rule, max_q, max_kv;
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
  const bool q_packed = o.q_starts.has_value(), kv_packed = o.kv_starts.has_value();
  a.B = q_packed ? o.q_starts->numel() - 1 : kv_packed ? o.kv_starts->numel() - 1 : qs[0];
  a.H = qs[1], a.D = qs[3], a.G = ks[1];
  a.N = q_packed ? o.max_q : qs[2];
  a.M = kv_packed ? o.max_kv : ks[2];
  require_attention(a.B >= 0 && a.N >= 0 && a.M >= 0, "starts are [B + 1], max_q and max_kv >= 0");
  require_attention(qs[0] == (q_packed ? 1 : a.B) && ks[0] == (kv_packed ? 1 : a.B) && ks[3] == a.D,
                    "k must have the batch and the head width of q");
  require_attention((!q_packed || o.q_lens.has_value()) && (!kv_packed || o.kv_lens.has_value()),
                    "packed rows need their lengths as well");
  require_attention(a.G == 0 ? a.H == 0 : a.H % a.G == 0, "H must be a multiple of G");
  if (a.G == 0) a.G = 1;
  a.dtype = dtype_of(q);
  require_attention(dtype_of(k) == a.dtype, "q and k must have the same dtype");
  require_attention(dense_rows(q) && dense_rows(k), "the last dim of q and k must be dense");
  a.q =
      strided(q, attention_ints(o.q_starts, a.B + 1, "q_starts must be contiguous int32 [B + 1]"));
  a.k = strided(k,
                attention_ints(o.kv_starts, a.B + 1, "kv_starts must be contiguous int32 [B + 1]"));
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

// Without v the values are the keys.
inline void set_values(CrossAttentionProblem& a, const Tensor& k, const OptionalTensor& given,
                       const OptionalTensor& gate, const OptionalTensor& seed, double dropout_p) {
  const Tensor& v = given.has_value() ? *given : k;
  require_attention(v.dim() == 4, "v must have 4 dims");
  const auto ks = k.sizes(), vs = v.sizes();
  require_attention(
      vs[0] == ks[0] && vs[1] == ks[1] && vs[2] == ks[2] && dtype_of(v) == a.dtype && dense_rows(v),
      "v must go with k");
  a.Dv = vs[3];
  a.v = strided(v, a.k.starts);
  if (gate.has_value()) {
    const auto s = gate->sizes();
    const auto strides = gate->strides();
    const bool packed = a.q.starts != nullptr;  // then [1, Tq, H] or [1, Tq, H, Dv]
    require_attention((gate->dim() == 3 || (gate->dim() == 4 && s[3] == a.Dv)) && s[2] == a.H &&
                          s[0] == (packed ? 1 : a.B) && (packed || s[1] == a.N),
                      "gate must be [B, N, H] or [B, N, H, Dv]");
    // A logit per channel of width 1 is a logit per head.
    const bool wide = gate->dim() == 4 && a.Dv > 1;
    require_attention(!wide || strides[3] == 1, "the last dim of gate must be dense");
    a.gate = {gate->data_ptr(), strides[0],      strides[2], strides[1],
              wide ? 1 : 0,     dtype_of(*gate), a.q.starts};
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
