// Registration of cross_attention's four ops for the CUDA kernels: tensors -> AttentionArgs, and
// the memory of results and of the passes.
#include <tuple>

#include "../cuda/cross_attention.h"
#include "cross_attention_args.h"
#include "cuda_register.h"
#include "cuda_tensor.h"

namespace mmfast {
namespace {

// ---- tensors as the kernels take them -----------------------------------------------------------

bool multiple_of_16(int64_t elements, DType dtype) {
  return elements * dtype_bytes(dtype) % 16 == 0;
}

AttentionTensor attention_tensor(const Tensor& t) {
  const DType dtype = dtype_of(t);
  AttentionTensor x = {t.data_ptr(), stride_or_zero(t, 0), stride_or_zero(t, 1),
                       stride_or_zero(t, 2), false};
  x.wide = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && multiple_of_16(t.sizes()[3], dtype) &&
           multiple_of_16(x.sb, dtype) && multiple_of_16(x.sh, dtype) &&
           multiple_of_16(x.sn, dtype);
  return x;
}

AttentionPairs attention_pairs(const Broadcast& x) {
  return {x.data, x.sb, x.sh, x.sn, x.sm, x.dtype};
}

int32_t size_of(const CudaCall& call, const char* name, int64_t size) {
  if (size > kLargestSize)
    call.fail(std::string(name) + "=" + std::to_string(size) + "; a GPU kernel goes up to " +
              std::to_string(kLargestSize) + "; split the call");
  return int32_t(size);
}

// What is the same in all four ops.
struct Attention {
  CudaCall call;
  CrossAttentionProblem problem;
  AttentionArgs args;

  Attention(const Tensor& q, const Tensor& k, const AttentionConditions& given)
      : call("cross_attention", "q", q) {
    call.takes("k", k);
    call.takes("kv_lens", given.kv_lens);
    call.takes("q_lens", given.q_lens);
    call.takes("q_segments", given.q_segments);
    call.takes("kv_segments", given.kv_segments);
    call.takes("mask", given.mask);
    call.takes("bias", given.bias);
    call.takes("q_starts", given.q_starts);
    call.takes("kv_starts", given.kv_starts);
    const CrossAttentionProblem& x = problem;
    set_queries_and_keys(problem, q, k, given);
    require_widths(x, kWidestHead);
    require_attention(
        x.bias.data == nullptr || x.bias.dtype == x.dtype || x.bias.dtype == DType::F32,
        "bias must have the dtype of q or float32");
    AttentionRules& r = args.rules;
    r.B = size_of(call, "B", x.B), r.H = size_of(call, "H", x.H), r.G = size_of(call, "G", x.G);
    r.N = size_of(call, "N", x.N), r.M = size_of(call, "M", x.M);
    r.heads = r.H / r.G;
    r.kv_lens = x.kv_lens, r.q_lens = x.q_lens;
    r.kv_starts = x.k.starts, r.q_starts = x.q.starts;
    r.q_segments = x.q_segments, r.kv_segments = x.kv_segments;
    r.segments_at_most = x.segments_at_most, r.is_causal = x.is_causal;
    r.mask = attention_pairs(x.mask), r.bias = attention_pairs(x.bias);
    r.scale = float(x.scale);
    args.dtype = x.dtype;
    args.D = int32_t(x.D);
    args.q = attention_tensor(q), args.k = attention_tensor(k);
    args.q_rows = size_of(call, "rows of q", q.sizes()[2]);
    args.kv_rows = size_of(call, "rows of k", k.sizes()[2]);
  }

  void set_output(const Tensor& k, const OptionalTensor& v, const OptionalTensor& gate,
                  const OptionalTensor& seed, double dropout_p) {
    call.require(v.has_value(), "these kernels take values of their own: give k as v");
    call.takes("v", *v);
    call.takes("gate", gate);
    call.takes("seed", seed);
    const CrossAttentionProblem& x = problem;
    set_values(problem, k, v, gate, seed, dropout_p);
    require_widths(x, kWidestHead);
    require_attention(
        x.gate.data == nullptr || x.gate.dtype == x.dtype || x.gate.dtype == DType::F32,
        "gate must have the dtype of q or float32");
    AttentionRules& r = args.rules;
    r.seed = x.seed, r.drop_threshold = x.drop_threshold, r.keep_scale = float(x.keep_scale);
    args.Dv = int32_t(x.Dv);
    args.v = attention_tensor(*v);
    args.gate = attention_pairs(x.gate);
    if (packed_queries()) args.gate.sb = 0;
    args.gate_wide =
        args.gate.sm == 1 && reinterpret_cast<uintptr_t>(args.gate.data) % 16 == 0 &&
        multiple_of_16(x.Dv, x.gate.dtype) && multiple_of_16(x.gate.sb, x.gate.dtype) &&
        multiple_of_16(x.gate.sh, x.gate.dtype) && multiple_of_16(x.gate.sn, x.gate.dtype);
  }

  // The LSE of a forward. Kernels only read it.
  void set_lse(const Tensor& lse) {
    call.takes("lse", lse);
    require_lse(problem, lse);
    args.lse = static_cast<float*>(lse.data_ptr());
  }

  // Of one of the ops' results, or of what came in for one.
  AttentionTensor of_rows(const Tensor& t, const char* name) const {
    call.takes(name, t);
    const auto s = t.sizes();
    if (t.dim() != 4 || dtype_of(t) != problem.dtype ||
        s[0] != (packed_queries() ? 1 : problem.B) || s[1] != problem.H || s[2] != args.q_rows ||
        s[3] != problem.Dv || !dense_rows(t))
      call.fail(std::string(name) + " must be [B, H, N, Dv] of the dtype of q, its last dim dense");
    return attention_tensor(t);
  }
  const float* sums(const Tensor& t, const char* name, int64_t count) const {
    call.takes(name, t);
    if (t.scalar_type() != ScalarType::Float || !t.is_contiguous() || t.numel() != count)
      call.fail(std::string(name) + " must be contiguous float32 of " + std::to_string(count) +
                " elements");
    return static_cast<const float*>(t.data_ptr());
  }

  bool packed_queries() const { return problem.q.starts != nullptr; }
  int64_t rows() const { return problem.B * problem.H * problem.N; }
  // Without rows or without keys there is nothing to launch for a gradient.
  bool nothing() const { return rows() == 0 || problem.M == 0; }

  Tensor sums(int64_t count_of_rows) const {
    return call.empty<3>({problem.B, problem.H, count_of_rows}, DType::F32);
  }

  // The gradient of a bias, contiguous in its shape.
  Tensor make_dbias(const OptionalTensor& bias, bool needed) {
    if (!needed || !bias.has_value()) return call.nothing(problem.dtype);
    const auto s = bias->sizes();
    Tensor dbias = call.empty<4>({s[0], s[1], s[2], s[3]}, dtype_of(*bias));
    if (dbias.numel() > 0) args.dbias = attention_pairs(broadcast(dbias, dtype_of(*bias)));
    return dbias;
  }
};

using Workspace = int64_t (*)(const AttentionArgs&, const Stream&);
using Pass = void (*)(const AttentionArgs&, void*, const Stream&);

void run(const Attention& x, Workspace bytes, Pass pass) {
  const Stream stream = x.call.stream();
  const Tensor workspace = x.call.workspace(bytes(x.args, stream));
  pass(x.args, workspace.data_ptr(), stream);
}

// ---- the ops ------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, OptionalTensor v, OptionalTensor kv_lens,
                                   OptionalTensor q_lens, OptionalTensor q_segments,
                                   OptionalTensor kv_segments, OptionalTensor mask,
                                   OptionalTensor bias, OptionalTensor q_starts,
                                   OptionalTensor kv_starts, OptionalTensor gate,
                                   OptionalTensor seed, double scale, double dropout_p,
                                   bool is_causal, int64_t segment_rule, int64_t max_q,
                                   int64_t max_kv) {
  Attention x(q, k,
              {kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts, scale,
               is_causal, segment_rule, max_q, max_kv});
  x.set_output(k, v, gate, seed, dropout_p);
  Tensor out = empty_following(q, x.problem.Dv, x.call.place());
  Tensor lse = x.sums(x.problem.N);
  if (x.rows() == 0) {
    x.call.zero(out);  // rows of no item
    return {out, lse};
  }
  x.args.out = attention_tensor(out);
  x.args.lse = static_cast<float*>(lse.data_ptr());
  run(x, cross_attention_fwd_workspace, cross_attention_fwd);
  return {out, lse};
}

std::tuple<Tensor, Tensor> probabilities(Tensor q, Tensor k, Tensor lse, OptionalTensor kv_lens,
                                         OptionalTensor q_lens, OptionalTensor q_segments,
                                         OptionalTensor kv_segments, OptionalTensor mask,
                                         OptionalTensor bias, OptionalTensor q_starts,
                                         OptionalTensor kv_starts, double scale, bool is_causal,
                                         int64_t segment_rule, int64_t max_q, int64_t max_kv,
                                         bool importance, int64_t weights) {
  Attention x(q, k,
              {kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts, scale,
               is_causal, segment_rule, max_q, max_kv});
  x.set_lse(lse);
  const auto& [B, H, N, M, dtype] =
      std::tie(x.problem.B, x.problem.H, x.problem.N, x.problem.M, x.problem.dtype);
  Tensor sums = importance ? x.sums(M) : x.call.nothing(DType::F32);
  if (sums.numel() > 0 && N == 0) {
    x.call.zero(sums);
  } else if (sums.numel() > 0) {
    x.args.importance = static_cast<float*>(sums.data_ptr());
    run(x, cross_attention_importance_workspace, cross_attention_importance);
  }
  Tensor matrix = weights == 0   ? x.call.nothing(dtype)
                  : weights == 1 ? x.call.empty<3>({B, N, M}, dtype)
                                 : x.call.empty<4>({B, H, N, M}, dtype);
  if (matrix.numel() > 0) {
    x.args.weights_mean = weights == 1;
    const int64_t heads = weights == 1 ? 1 : H;
    x.args.weights = {matrix.data_ptr(), heads * N * M, weights == 1 ? 0 : N * M, M, false};
    run(x, cross_attention_weights_workspace, cross_attention_weights);
  }
  return {sums, matrix};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, OptionalTensor v, Tensor out, Tensor lse,
    OptionalTensor kv_lens, OptionalTensor q_lens, OptionalTensor q_segments,
    OptionalTensor kv_segments, OptionalTensor mask, OptionalTensor bias, OptionalTensor q_starts,
    OptionalTensor kv_starts, OptionalTensor gate, OptionalTensor seed, double scale,
    double dropout_p, bool is_causal, int64_t segment_rule, int64_t max_q, int64_t max_kv,
    bool need_dbias, bool /* need_dk: it is for shared keys and values, which are not taken */) {
  Attention x(q, k,
              {kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts, scale,
               is_causal, segment_rule, max_q, max_kv});
  x.set_output(k, v, gate, seed, dropout_p);
  x.set_lse(lse);
  const CrossAttentionProblem& p = x.problem;
  const Place& place = x.call.place();
  AttentionArgs& a = x.args;
  a.dout = x.of_rows(dout, "dout"), a.out = x.of_rows(out, "out");
  if (dlse.has_value()) a.dlse = x.sums(*dlse, "dlse", x.rows());
  Tensor dq = empty_following(q, p.D, place);
  Tensor dk = empty_following(k, p.D, place), dv = empty_following(*v, p.Dv, place);
  Tensor dbias = x.make_dbias(bias, need_dbias);
  Tensor dgate = x.call.nothing(p.dtype), delta = dgate, dout_gated = dgate;
  if (gate.has_value()) {
    const auto s = gate->sizes();
    const int64_t width = gate->dim() == 4 ? p.Dv : 1;
    dgate = gate->dim() == 4 ? x.call.empty<4>({s[0], s[1], s[2], s[3]}, dtype_of(*gate))
                             : x.call.empty<3>({s[0], s[1], s[2]}, dtype_of(*gate));
    a.dgate = {dgate.data_ptr(),
               x.packed_queries() ? 0 : p.N * p.H * width,
               width,
               p.H * width,
               width > 1 ? 1 : 0,
               dtype_of(*gate)};
  }
  if (x.nothing()) {
    for (const Tensor& t : {dq, dk, dv, dbias, dgate}) x.call.zero(t);
    return {dq, dk, dv, dbias, dgate};
  }
  delta = x.sums(p.N);
  a.delta = static_cast<float*>(delta.data_ptr());
  if (gate.has_value()) {
    dout_gated = empty_following(q, p.Dv, place);
    a.dout_gated = attention_tensor(dout_gated);
  }
  a.dq = attention_tensor(dq), a.dk = attention_tensor(dk), a.dv = attention_tensor(dv);
  run(x, cross_attention_bwd_workspace, cross_attention_bwd);
  return {dq, dk, dv, dbias, dgate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> probabilities_backward(
    OptionalTensor dimportance, OptionalTensor dweights, Tensor q, Tensor k, Tensor lse,
    OptionalTensor kv_lens, OptionalTensor q_lens, OptionalTensor q_segments,
    OptionalTensor kv_segments, OptionalTensor mask, OptionalTensor bias, OptionalTensor q_starts,
    OptionalTensor kv_starts, double scale, bool is_causal, int64_t segment_rule, int64_t max_q,
    int64_t max_kv, bool need_dbias) {
  Attention x(q, k,
              {kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts, kv_starts, scale,
               is_causal, segment_rule, max_q, max_kv});
  x.set_lse(lse);
  const CrossAttentionProblem& p = x.problem;
  const Place& place = x.call.place();
  AttentionArgs& a = x.args;
  Tensor dq = empty_following(q, p.D, place), dk = empty_following(k, p.D, place);
  Tensor dlse = x.sums(p.N);
  Tensor dbias = x.make_dbias(bias, need_dbias);
  if (dimportance.has_value()) a.dimportance = x.sums(*dimportance, "dimportance", p.B * p.H * p.M);
  if (dweights.has_value()) {
    x.call.takes("dweights", *dweights);
    a.weights_mean = dweights->dim() == 3;
    const int64_t heads = a.weights_mean ? 1 : p.H;
    require_attention(dtype_of(*dweights) == p.dtype && dweights->is_contiguous() &&
                          dweights->numel() == p.B * heads * p.N * p.M,
                      "dweights must be contiguous [B, N, M] or [B, H, N, M] of the dtype of q");
    a.dweights = {dweights->data_ptr(), heads * p.N * p.M, a.weights_mean ? 0 : p.N * p.M, p.M,
                  false};
  }
  if (x.nothing()) {
    for (const Tensor& t : {dq, dk, dbias, dlse}) x.call.zero(t);
    return {dq, dk, dbias, dlse};
  }
  a.dlse_out = static_cast<float*>(dlse.data_ptr());
  a.dq = attention_tensor(dq), a.dk = attention_tensor(dk);
  run(x, cross_attention_probs_bwd_workspace, cross_attention_probs_bwd);
  return {dq, dk, dbias, dlse};
}

}  // namespace
}  // namespace mmfast

MMFAST_CUDA_LIBRARY(m) {
  m.def(mmfast::schemas::kCrossAttentionFwd);
  m.def(mmfast::schemas::kCrossAttentionBwd);
  m.def(mmfast::schemas::kCrossAttentionProbs);
  m.def(mmfast::schemas::kCrossAttentionProbsBwd);
}

MMFAST_CUDA_IMPL(m) {
  m.impl("cross_attention_fwd", TORCH_BOX(&mmfast::forward));
  m.impl("cross_attention_bwd", TORCH_BOX(&mmfast::backward));
  m.impl("cross_attention_probs", TORCH_BOX(&mmfast::probabilities));
  m.impl("cross_attention_probs_bwd", TORCH_BOX(&mmfast::probabilities_backward));
}
