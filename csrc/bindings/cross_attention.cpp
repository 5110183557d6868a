// Registration of cross_attention's four ops for CPU tensors: tensors -> CrossAttentionArgs, the
// memory of results, and which passes run. Shapes and dtypes are checked by the Python op; what is
// checked here again is only what would be unsafe.
#include <cmath>
#include <cstring>
#include <tuple>

#include "../cpu/isa.h"
#include "parallel.h"
#include "tensor.h"

namespace mmfast {
namespace {

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("mmfast::cross_attention: ") + what);
}

const int32_t* ints(const OptionalTensor& t, int64_t count, const char* what) {
  if (!t.has_value()) return nullptr;
  require(t->scalar_type() == ScalarType::Int && t->numel() == count && t->is_contiguous(), what);
  return static_cast<const int32_t*>(t->data_ptr());
}

struct Options {
  const OptionalTensor &kv_lens, &q_lens, &q_segments, &kv_segments, &mask, &bias;
  double scale;
  bool is_causal;
  int64_t segment_rule;
};

CrossAttentionArgs make_args(const Tensor& q, const Tensor& k, const Options& o) {
  CrossAttentionArgs a;
  require(q.dim() == 4 && k.dim() == 4, "q and k must have 4 dims");
  const auto qs = q.sizes(), ks = k.sizes();
  a.B = qs[0], a.H = qs[1], a.N = qs[2], a.D = qs[3];
  a.G = ks[1], a.M = ks[2];
  require(ks[0] == a.B && ks[3] == a.D, "k must have the batch and the head width of q");
  require(a.G == 0 ? a.H == 0 : a.H % a.G == 0, "H must be a multiple of G");
  if (a.G == 0) a.G = 1;
  a.dtype = dtype_of(q);
  require(dtype_of(k) == a.dtype, "q and k must have the same dtype");
  a.q = strided(q);
  a.k = strided(k);
  a.kv_lens = ints(o.kv_lens, a.B, "kv_lens must be contiguous int32 [B]");
  a.q_lens = ints(o.q_lens, a.B, "q_lens must be contiguous int32 [B]");
  a.q_segments = ints(o.q_segments, a.B * a.N, "q_segments must be contiguous int32 [B, N]");
  a.kv_segments = ints(o.kv_segments, a.B * a.M, "kv_segments must be contiguous int32 [B, M]");
  // Not by pointers: an empty tensor has none.
  require(o.q_segments.has_value() == o.kv_segments.has_value(), "segments come in pairs");
  a.segments_at_most = o.segment_rule == 1;
  a.is_causal = o.is_causal;
  a.scale = o.scale;
  const auto fits = [&](const Tensor& t) {
    const auto s = t.sizes();
    return t.dim() == 4 && (s[0] == 1 || s[0] == a.B) && (s[1] == 1 || s[1] == a.H) &&
           (s[2] == 1 || s[2] == a.N) && (s[3] == 1 || s[3] == a.M) &&
           (s[3] == 1 || t.strides()[3] == 1);
  };
  if (o.mask.has_value() && o.mask->numel() > 0) {
    require(o.mask->scalar_type() == ScalarType::Bool && fits(*o.mask), "mask does not broadcast");
    a.mask = broadcast(*o.mask, DType::F32);
  }
  if (o.bias.has_value() && o.bias->numel() > 0) {
    require(fits(*o.bias), "bias does not broadcast");
    a.bias = broadcast(*o.bias, dtype_of(*o.bias));
  }
  return a;
}

void set_values(CrossAttentionArgs& a, const Tensor& v, const OptionalTensor& gate,
                const OptionalTensor& seed, double dropout_p) {
  const auto vs = v.sizes();
  require(a.D <= 512 && vs[vs.size() - 1] <= 512, "head widths go up to 512");
  require(v.dim() == 4 && vs[0] == a.B && vs[2] == a.M && dtype_of(v) == a.dtype,
          "v must go with k");
  a.Dv = vs[3];
  a.v = strided(v);
  if (gate.has_value()) {
    const auto s = gate->sizes();
    const auto strides = gate->strides();
    require((gate->dim() == 3 || (gate->dim() == 4 && s[3] == a.Dv)) && s[0] == a.B &&
                s[1] == a.N && s[2] == a.H,
            "gate must be [B, N, H] or [B, N, H, Dv]");
    // A logit per channel of width 1 is a logit per head.
    const bool wide = gate->dim() == 4 && a.Dv > 1;
    require(!wide || strides[3] == 1, "the last dim of gate must be dense");
    a.gate = {gate->data_ptr(), strides[0], strides[2], strides[1], wide ? 1 : 0, dtype_of(*gate)};
  }
  if (dropout_p > 0) {
    require(seed.has_value() && seed->numel() >= 1 && seed->scalar_type() == ScalarType::Long,
            "dropout needs an int64 seed");
    a.seed = static_cast<const int64_t*>(seed->data_ptr());
    const double threshold = dropout_p * 4294967296.0;
    a.drop_threshold = threshold >= 4294967295.0 ? 4294967295u : uint32_t(threshold);
    a.keep_scale = 1.0 / (1.0 - dropout_p);
  }
}

double multiply_adds(const CrossAttentionArgs& a, double per_score) {
  return double(a.B) * double(a.H) * double(a.N) * double(a.M) * per_score;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor kv_lens,
                                   OptionalTensor q_lens, OptionalTensor q_segments,
                                   OptionalTensor kv_segments, OptionalTensor mask,
                                   OptionalTensor bias, OptionalTensor gate, OptionalTensor seed,
                                   double scale, double dropout_p, bool is_causal,
                                   int64_t segment_rule) {
  CrossAttentionArgs a = make_args(
      q, k, {kv_lens, q_lens, q_segments, kv_segments, mask, bias, scale, is_causal, segment_rule});
  set_values(a, v, gate, seed, dropout_p);
  Tensor out = empty_following(q, a.Dv);
  Tensor lse = empty_cpu<3>({a.B, a.H, a.N}, accumulate_dtype(a.dtype));
  a.out = strided(out);
  a.lse = lse.data_ptr();
  if (a.B * a.H * a.N > 0)
    run_pass(cross_attention_kernels(a.dtype).fwd, a, multiply_adds(a, double(a.D + a.Dv)));
  return {out, lse};
}

std::tuple<Tensor, Tensor> probabilities(Tensor q, Tensor k, Tensor lse, OptionalTensor kv_lens,
                                         OptionalTensor q_lens, OptionalTensor q_segments,
                                         OptionalTensor kv_segments, OptionalTensor mask,
                                         OptionalTensor bias, double scale, bool is_causal,
                                         int64_t segment_rule, bool importance, int64_t weights) {
  CrossAttentionArgs a = make_args(
      q, k, {kv_lens, q_lens, q_segments, kv_segments, mask, bias, scale, is_causal, segment_rule});
  require(lse.is_contiguous() && lse.numel() == a.B * a.H * a.N, "lse must be [B, H, N]");
  const DType acc = accumulate_dtype(a.dtype);
  const CrossAttentionKernels& kernels = cross_attention_kernels(a.dtype);
  const double work = multiply_adds(a, double(a.D));
  a.lse = lse.data_ptr();
  Tensor sums = importance ? empty_cpu<3>({a.B, a.H, a.M}, acc) : empty_cpu<1>({0}, acc);
  if (importance && sums.numel() > 0) {
    a.importance = sums.data_ptr();
    run_pass(kernels.importance, a, work);
  }
  Tensor matrix = weights == 0   ? empty_cpu<1>({0}, a.dtype)
                  : weights == 1 ? empty_cpu<3>({a.B, a.N, a.M}, a.dtype)
                                 : empty_cpu<4>({a.B, a.H, a.N, a.M}, a.dtype);
  if (weights != 0 && matrix.numel() > 0) {
    a.weights_mean = weights == 1;
    const int64_t heads = weights == 1 ? 1 : a.H;
    a.weights = {matrix.data_ptr(), heads * a.N * a.M, weights == 1 ? 0 : a.N * a.M, a.M, a.dtype};
    run_pass(kernels.weights, a, work);
  }
  return {sums, matrix};
}

// ---- backward ---------------------------------------------------------------------------------

// Memory of a backward: what lives only during the call.
struct BackwardBuffers {
  Tensor dq_acc, dlse_part, dbias_part, dout_gated, delta;
};

// Few key/value heads leave threads idle, so the keys are cut into ranges, at the price of an
// addend of dq for each. The cut depends on the shape only: any number of threads, the same bits.
void cut_keys(CrossAttentionArgs& a) {
  const int64_t heads = a.B * a.G;
  const int64_t wanted = heads > 0 ? (48 + heads - 1) / heads : 1;
  int64_t chunks = std::min<int64_t>({wanted, 4, a.M / 512});
  if (chunks < 1) chunks = 1;
  a.chunk_keys = (a.M + chunks - 1) / chunks;
  a.chunk_keys = std::max<int64_t>(
      (a.chunk_keys + kBackwardKeys - 1) / kBackwardKeys * kBackwardKeys, kBackwardKeys);
  a.key_chunks = std::max<int64_t>((a.M + a.chunk_keys - 1) / a.chunk_keys, 1);
}

template <class Acc>
double value_at(const void* data, int64_t i) {
  return double(static_cast<const Acc*>(data)[i]);
}

void store_at(void* data, DType dtype, int64_t i, double x) {
  switch (dtype) {
    case DType::F64:
      static_cast<double*>(data)[i] = x;
      break;
    case DType::F32:
      static_cast<float*>(data)[i] = float(x);
      break;
    case DType::BF16:
      static_cast<uint16_t*>(data)[i] = float_to_bf16(float(x));
      break;
    case DType::F16:
      static_cast<uint16_t*>(data)[i] = float_to_f16(float(x));
      break;
  }
}

double load_acc(const void* data, DType acc, int64_t i) {
  return acc == DType::F64 ? value_at<double>(data, i) : value_at<float>(data, i);
}

// dbias in mode 2: partial sums [C,B,H,L] (C ranges, or 1 with L = M) over what is broadcast.
void sum_dbias(const CrossAttentionArgs& a, DType acc) {
  const int64_t length = a.dbias_has_m ? a.M : a.N;
  const int64_t chunks = a.dbias_has_m ? 1 : a.key_chunks;
  const bool keep_l = a.dbias_has_m || a.dbias_has_n;
  const int64_t ob = a.dbias_has_b ? a.B : 1, oh = a.dbias_has_h ? a.H : 1;
  const int64_t ol = keep_l ? length : 1;
  for (int64_t i = 0; i < ob * oh * ol; ++i) {
    const int64_t b0 = i / (oh * ol), h0 = i / ol % oh, l0 = i % ol;
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t b = a.dbias_has_b ? b0 : 0; b < (a.dbias_has_b ? b0 + 1 : a.B); ++b)
        for (int64_t h = a.dbias_has_h ? h0 : 0; h < (a.dbias_has_h ? h0 + 1 : a.H); ++h)
          for (int64_t l = keep_l ? l0 : 0; l < (keep_l ? l0 + 1 : length); ++l)
            sum += load_acc(a.dbias_part, acc, ((c * a.B + b) * a.H + h) * length + l);
    store_at(a.dbias.data, a.dbias.dtype, i, sum);
  }
}

// Which of the three ways of CrossAttentionArgs::dbias_mode, and its memory. The result is
// contiguous in the shape of the bias.
Tensor make_dbias(CrossAttentionArgs& a, const OptionalTensor& bias, bool needed, DType acc,
                  BackwardBuffers& buffers) {
  if (!needed || !bias.has_value()) return empty_cpu<1>({0}, a.dtype);
  const auto s = bias->sizes();
  Tensor dbias = empty_cpu<4>({s[0], s[1], s[2], s[3]}, dtype_of(*bias));
  fill_zero(dbias);
  a.dbias = broadcast(dbias, dtype_of(*bias));
  a.dbias_has_b = s[0] == a.B, a.dbias_has_h = s[1] == a.H;
  a.dbias_has_n = s[2] == a.N, a.dbias_has_m = s[3] == a.M;
  if (dbias.numel() == 0 || a.B * a.H * a.N * a.M == 0) return dbias;
  if (a.dbias_has_n && a.dbias_has_m) {
    a.dbias_mode = a.dbias_has_b && a.dbias_has_h ? 1 : 3;
  } else {
    a.dbias_mode = 2;
    buffers.dbias_part = a.dbias_has_m ? empty_cpu<4>({1, a.B, a.H, a.M}, acc)
                                       : empty_cpu<4>({a.key_chunks, a.B, a.H, a.N}, acc);
    fill_zero(buffers.dbias_part);
    a.dbias_part = buffers.dbias_part.data_ptr();
  }
  return dbias;
}

void make_dq(CrossAttentionArgs& a, const Tensor& dq, DType acc, BackwardBuffers& buffers) {
  a.dq = strided(dq);
  if ((a.key_chunks == 1 && acc == a.dtype) || dq_written_once(a)) return;
  buffers.dq_acc = empty_cpu<5>({a.key_chunks, a.B, a.H, a.N, a.D}, acc);
  a.dq_acc = buffers.dq_acc.data_ptr();
}

void run_backward(const CrossAttentionKernels& kernels, const CrossAttentionArgs& a, DType acc,
                  double work) {
  run_pass(kernels.bwd, a, work);
  run_pass(kernels.bwd_dq, a, double(a.B * a.H * a.N) * double(a.D * a.key_chunks));
  if (a.dbias_mode == 2) sum_dbias(a, acc);
  if (a.dbias_mode == 3) run_pass(kernels.bwd_dbias, a, work);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor kv_lens, OptionalTensor q_lens, OptionalTensor q_segments,
    OptionalTensor kv_segments, OptionalTensor mask, OptionalTensor bias, OptionalTensor gate,
    OptionalTensor seed, double scale, double dropout_p, bool is_causal, int64_t segment_rule,
    bool need_dbias) {
  CrossAttentionArgs a = make_args(
      q, k, {kv_lens, q_lens, q_segments, kv_segments, mask, bias, scale, is_causal, segment_rule});
  set_values(a, v, gate, seed, dropout_p);
  require(lse.is_contiguous() && lse.numel() == a.B * a.H * a.N, "lse must be [B, H, N]");
  require(!dlse.has_value() || (dlse->is_contiguous() && dlse->numel() == lse.numel()),
          "dlse must be contiguous [B, H, N]");
  require(dtype_of(dout) == a.dtype && dtype_of(out) == a.dtype, "dout must have the dtype of q");
  const DType acc = accumulate_dtype(a.dtype);
  const CrossAttentionKernels& kernels = cross_attention_kernels(a.dtype);
  BackwardBuffers buffers;
  Tensor dq = empty_following(q, a.D), dk = empty_following(k, a.D), dv = empty_following(v, a.Dv);
  Tensor dgate = empty_cpu<1>({0}, a.dtype);
  if (gate.has_value()) {
    dgate = gate->dim() == 4 ? empty_cpu<4>({a.B, a.N, a.H, a.Dv}, dtype_of(*gate))
                             : empty_cpu<3>({a.B, a.N, a.H}, dtype_of(*gate));
    fill_zero(dgate);
  }
  cut_keys(a);
  Tensor dbias = make_dbias(a, bias, need_dbias, acc, buffers);
  if (a.B * a.H * a.N == 0) {
    fill_zero(dk);
    fill_zero(dv);
    return {dq, dk, dv, dbias, dgate};
  }
  a.out = strided(out);
  a.lse = lse.data_ptr();
  a.dout_raw = strided(dout);
  a.dout = a.dout_raw;
  a.dlse = dlse.has_value() ? dlse->data_ptr() : nullptr;
  if (gate.has_value()) {
    buffers.delta = empty_cpu<3>({a.B, a.H, a.N}, acc);
    a.delta = buffers.delta.data_ptr();
    buffers.dout_gated = empty_cpu<4>({a.B, a.H, a.N, a.Dv}, acc);
    a.dout_gated = strided(buffers.dout_gated);
    a.dout = a.dout_gated;
    a.dgate = dgate.data_ptr();
  }
  make_dq(a, dq, acc, buffers);
  a.dk = strided(dk);
  a.dv = strided(dv);
  if (gate.has_value()) run_pass(kernels.bwd_rows, a, double(a.B * a.H * a.N) * double(4 * a.Dv));
  run_backward(kernels, a, acc, multiply_adds(a, double(3 * a.D + 2 * a.Dv)));
  return {dq, dk, dv, dbias, dgate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> probabilities_backward(
    OptionalTensor dimportance, OptionalTensor dweights, Tensor q, Tensor k, Tensor lse,
    OptionalTensor kv_lens, OptionalTensor q_lens, OptionalTensor q_segments,
    OptionalTensor kv_segments, OptionalTensor mask, OptionalTensor bias, double scale,
    bool is_causal, int64_t segment_rule, bool need_dbias) {
  CrossAttentionArgs a = make_args(
      q, k, {kv_lens, q_lens, q_segments, kv_segments, mask, bias, scale, is_causal, segment_rule});
  require(lse.is_contiguous() && lse.numel() == a.B * a.H * a.N, "lse must be [B, H, N]");
  const DType acc = accumulate_dtype(a.dtype);
  BackwardBuffers buffers;
  Tensor dq = empty_following(q, a.D), dk = empty_following(k, a.D);
  Tensor dlse = empty_cpu<3>({a.B, a.H, a.N}, acc);
  cut_keys(a);
  Tensor dbias = make_dbias(a, bias, need_dbias, acc, buffers);
  if (a.B * a.H * a.N == 0) {
    fill_zero(dk);
    return {dq, dk, dbias, dlse};
  }
  a.lse = lse.data_ptr();
  if (dimportance.has_value()) {
    require(dimportance->is_contiguous() && dtype_of(*dimportance) == acc,
            "dimportance must be contiguous [B, H, M]");
    a.dimportance = dimportance->data_ptr();
  }
  if (dweights.has_value()) {
    require(dweights->is_contiguous(), "dweights must be contiguous");
    a.weights_mean = dweights->dim() == 3;
    const int64_t heads = a.weights_mean ? 1 : a.H;
    a.dweights = {dweights->data_ptr(), heads * a.N * a.M, a.weights_mean ? 0 : a.N * a.M, a.M, 1,
                  dtype_of(*dweights)};
  }
  make_dq(a, dq, acc, buffers);
  a.dk = strided(dk);
  buffers.dlse_part = a.key_chunks == 1 ? dlse : empty_cpu<4>({a.key_chunks, a.B, a.H, a.N}, acc);
  fill_zero(buffers.dlse_part);
  a.dlse_out = buffers.dlse_part.data_ptr();
  run_backward(cross_attention_kernels(a.dtype), a, acc, multiply_adds(a, double(3 * a.D)));
  if (a.key_chunks > 1) {
    const int64_t rows = a.B * a.H * a.N;
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < a.key_chunks; ++c) sum += load_acc(a.dlse_out, acc, c * rows + r);
      store_at(dlse.data_ptr(), acc, r, sum);
    }
  }
  return {dq, dk, dbias, dlse};
}

}  // namespace
}  // namespace mmfast

#define MMFAST_CONDITIONS                                                                    \
  "Tensor? kv_lens, Tensor? q_lens, Tensor? q_segments, Tensor? kv_segments, Tensor? mask, " \
  "Tensor? bias, "
#define MMFAST_VALUES "Tensor? gate, Tensor? seed, float scale, float dropout_p, "
#define MMFAST_RULES "bool is_causal, int segment_rule"

STABLE_TORCH_LIBRARY(mmfast, m) {
  m.def("cross_attention_fwd(Tensor q, Tensor k, Tensor v, " MMFAST_CONDITIONS
            MMFAST_VALUES MMFAST_RULES ") -> (Tensor, Tensor)");
  m.def(
      "cross_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, " MMFAST_CONDITIONS MMFAST_VALUES MMFAST_RULES
      ", bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cross_attention_probs(Tensor q, Tensor k, Tensor lse, " MMFAST_CONDITIONS
        "float scale, " MMFAST_RULES ", bool importance, int weights) -> (Tensor, Tensor)");
  m.def(
      "cross_attention_probs_bwd(Tensor? dimportance, Tensor? dweights, Tensor q, Tensor k, "
      "Tensor lse, " MMFAST_CONDITIONS "float scale, " MMFAST_RULES
      ", bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("cross_attention_fwd", TORCH_BOX(&mmfast::forward));
  m.impl("cross_attention_bwd", TORCH_BOX(&mmfast::backward));
  m.impl("cross_attention_probs", TORCH_BOX(&mmfast::probabilities));
  m.impl("cross_attention_probs_bwd", TORCH_BOX(&mmfast::probabilities_backward));
}
