// Registration of cross_attention's four ops for CPU tensors: tensors -> CrossAttentionArgs, the
// memory of results, and which passes run.
#include <cmath>
#include <cstring>
#include <tuple>

#include "../cpu/cross_attention_shared_cut.h"
#include "../cpu/isa.h"
#include "cross_attention_args.h"
#include "parallel.h"
#include "schemas.h"
#include "tensor.h"

namespace mmfast {
namespace {

constexpr int64_t kWidest = 8192;

// A graph computes starts and lengths from values that nobody has looked at.
void require_packing(const int32_t* starts, const int32_t* lens, int64_t B, int64_t rows,
                     int64_t most) {
  if (starts == nullptr) return;
  bool right = starts[0] >= 0 && starts[B] <= rows;
  for (int64_t b = 0; b < B; ++b) right = right && starts[b + 1] - starts[b] == lens[b];
  require_attention(right, "cumulative lengths must rise from 0 to at most the number of rows");
  for (int64_t b = 0; b < B; ++b)
    require_attention(lens[b] <= most, "an item is longer than max_q_len or max_kv_len says");
}

CrossAttentionArgs make_args(const Tensor& q, const Tensor& k, const AttentionConditions& given) {
  CrossAttentionArgs a;
  set_queries_and_keys(a, q, k, given);
  require_widths(a, kWidest);
  require_packing(a.q.starts, a.q_lens, a.B, q.sizes()[2], a.N);
  require_packing(a.k.starts, a.kv_lens, a.B, k.sizes()[2], a.M);
  return a;
}

void add_values(CrossAttentionArgs& a, const Tensor& k, const OptionalTensor& v,
                const OptionalTensor& gate, const OptionalTensor& seed, double dropout_p) {
  set_values(a, k, v, gate, seed, dropout_p);
  a.shared_kv = !v.has_value();
  require_widths(a, kWidest);
}

// Rows of a packed result that belong to no item: before the first one and past the last.
void zero_outside(const Tensor& t, const Strided& x, int64_t B) {
  if (x.starts == nullptr || t.numel() == 0) return;
  const auto sizes = t.sizes();
  const size_t row = size_t(sizes[3]) * size_t(dtype_bytes(x.dtype));
  for (int64_t h = 0; h < sizes[1]; ++h)
    for (int64_t n = 0; n < sizes[2]; ++n) {
      if (n == x.starts[0]) n = x.starts[B];
      if (n < sizes[2])
        std::memset(static_cast<char*>(x.data) + (h * x.sh + n * x.sn) * dtype_bytes(x.dtype), 0,
                    row);
    }
}

double multiply_adds(const CrossAttentionArgs& a, double per_score) {
  return double(a.B) * double(a.H) * double(a.N) * double(a.M) * per_score;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, OptionalTensor v, OptionalTensor kv_lens,
                                   OptionalTensor q_lens, OptionalTensor q_segments,
                                   OptionalTensor kv_segments, OptionalTensor mask,
                                   OptionalTensor bias, OptionalTensor q_starts,
                                   OptionalTensor kv_starts, OptionalTensor gate,
                                   OptionalTensor seed, double scale, double dropout_p,
                                   bool is_causal, int64_t segment_rule, int64_t max_q,
                                   int64_t max_kv) {
  CrossAttentionArgs a = make_args(q, k,
                                   {kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts,
                                    kv_starts, scale, is_causal, segment_rule, max_q, max_kv});
  add_values(a, k, v, gate, seed, dropout_p);
  Tensor out = empty_following(q, a.Dv);
  Tensor lse = empty_cpu<3>({a.B, a.H, a.N}, accumulate_dtype(a.dtype));
  a.out = strided(out, a.q.starts);
  zero_outside(out, a.out, a.B);
  a.lse = lse.data_ptr();
  if (a.B * a.H * a.N == 0) return {out, lse};
  const CrossAttentionKernels& kernels = cross_attention_kernels(a.dtype);
  Tensor parts;
  if (a.shared_kv) {
    cut_shared_forward(a);
    if (a.key_chunks > 1) {
      parts = empty_cpu<5>({a.key_chunks, a.B, a.H, a.N, shared_part_width(a)},
                           accumulate_dtype(a.dtype));
      a.out_part = parts.data_ptr();
    }
  }
  run_pass(kernels.fwd, a, multiply_adds(a, double(a.D + a.Dv)));
  run_pass(kernels.fwd_merge, a, double(a.B * a.H * a.N) * double(a.D * a.key_chunks));
  return {out, lse};
}

std::tuple<Tensor, Tensor> probabilities(Tensor q, Tensor k, Tensor lse, OptionalTensor kv_lens,
                                         OptionalTensor q_lens, OptionalTensor q_segments,
                                         OptionalTensor kv_segments, OptionalTensor mask,
                                         OptionalTensor bias, OptionalTensor q_starts,
                                         OptionalTensor kv_starts, double scale, bool is_causal,
                                         int64_t segment_rule, int64_t max_q, int64_t max_kv,
                                         bool importance, int64_t weights) {
  CrossAttentionArgs a = make_args(q, k,
                                   {kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts,
                                    kv_starts, scale, is_causal, segment_rule, max_q, max_kv});
  require_lse(a, lse);
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

// Heads wider than this are taken by the kernels for shared keys and values where those can:
// the others read a row of such a width several times.
constexpr int64_t kWideHead = 512;

// Few key/value heads leave threads idle, so the keys are cut into ranges, at the price of an
// addend of dq for each. The cut depends on the shape only: any number of threads, the same bits.
void cut_keys(CrossAttentionArgs& a) {
  if (a.shared_kv) return cut_shared_backward(a);
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
  a.dq = strided(dq, a.q.starts);
  zero_outside(dq, a.dq, a.B);
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
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, OptionalTensor v, Tensor out, Tensor lse,
    OptionalTensor kv_lens, OptionalTensor q_lens, OptionalTensor q_segments,
    OptionalTensor kv_segments, OptionalTensor mask, OptionalTensor bias, OptionalTensor q_starts,
    OptionalTensor kv_starts, OptionalTensor gate, OptionalTensor seed, double scale,
    double dropout_p, bool is_causal, int64_t segment_rule, int64_t max_q, int64_t max_kv,
    bool need_dbias, bool need_dk) {
  CrossAttentionArgs a = make_args(q, k,
                                   {kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts,
                                    kv_starts, scale, is_causal, segment_rule, max_q, max_kv});
  add_values(a, k, v, gate, seed, dropout_p);
  require_lse(a, lse);
  require_attention(!dlse.has_value() || (dlse->is_contiguous() && dlse->numel() == lse.numel()),
                    "dlse must be contiguous [B, H, N]");
  require_attention(dtype_of(dout) == a.dtype && dtype_of(out) == a.dtype,
                    "dout must have the dtype of q");
  const DType acc = accumulate_dtype(a.dtype);
  const CrossAttentionKernels& kernels = cross_attention_kernels(a.dtype);
  BackwardBuffers buffers;
  Tensor dq = empty_following(q, a.D);
  const bool no_dk = a.shared_kv && !need_dk;
  Tensor dk = no_dk ? empty_cpu<1>({0}, a.dtype) : empty_following(k, a.D);
  Tensor dv = a.shared_kv ? empty_cpu<1>({0}, a.dtype) : empty_following(*v, a.Dv);
  Tensor dgate = empty_cpu<1>({0}, a.dtype);
  if (gate.has_value()) {
    const auto s = gate->sizes();
    dgate = gate->dim() == 4 ? empty_cpu<4>({s[0], s[1], s[2], s[3]}, dtype_of(*gate))
                             : empty_cpu<3>({s[0], s[1], s[2]}, dtype_of(*gate));
    fill_zero(dgate);
  }
  cut_keys(a);
  Tensor dbias = make_dbias(a, bias, need_dbias, acc, buffers);
  if (a.B * a.H * a.N == 0) {
    fill_zero(dq);
    fill_zero(dk);
    fill_zero(dv);
    return {dq, dk, dv, dbias, dgate};
  }
  a.out = strided(out, a.q.starts);
  a.lse = lse.data_ptr();
  a.dout_raw = strided(dout, a.q.starts);
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
  if (!no_dk) a.dk = strided(dk, a.k.starts);
  if (!a.shared_kv) a.dv = strided(dv, a.k.starts);
  if (!no_dk) zero_outside(dk, a.dk, a.B);
  if (!a.shared_kv) zero_outside(dv, a.dv, a.B);
  if (gate.has_value()) run_pass(kernels.bwd_rows, a, double(a.B * a.H * a.N) * double(4 * a.Dv));
  run_backward(kernels, a, acc, multiply_adds(a, double(3 * a.D + 2 * a.Dv)));
  return {dq, dk, dv, dbias, dgate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> probabilities_backward(
    OptionalTensor dimportance, OptionalTensor dweights, Tensor q, Tensor k, Tensor lse,
    OptionalTensor kv_lens, OptionalTensor q_lens, OptionalTensor q_segments,
    OptionalTensor kv_segments, OptionalTensor mask, OptionalTensor bias, OptionalTensor q_starts,
    OptionalTensor kv_starts, double scale, bool is_causal, int64_t segment_rule, int64_t max_q,
    int64_t max_kv, bool need_dbias) {
  CrossAttentionArgs a = make_args(q, k,
                                   {kv_lens, q_lens, q_segments, kv_segments, mask, bias, q_starts,
                                    kv_starts, scale, is_causal, segment_rule, max_q, max_kv});
  require_lse(a, lse);
  const DType acc = accumulate_dtype(a.dtype);
  BackwardBuffers buffers;
  Tensor dq = empty_following(q, a.D), dk = empty_following(k, a.D);
  Tensor dlse = empty_cpu<3>({a.B, a.H, a.N}, acc);
  a.shared_kv = a.D > kWideHead;  // there are no values: what is asked for is the same
  cut_keys(a);
  Tensor dbias = make_dbias(a, bias, need_dbias, acc, buffers);
  if (a.B * a.H * a.N == 0) {
    fill_zero(dq);
    fill_zero(dk);
    return {dq, dk, dbias, dlse};
  }
  a.lse = lse.data_ptr();
  if (dimportance.has_value()) {
    require_attention(dimportance->is_contiguous() && dtype_of(*dimportance) == acc,
                      "dimportance must be contiguous [B, H, M]");
    a.dimportance = dimportance->data_ptr();
  }
  if (dweights.has_value()) {
    require_attention(dweights->is_contiguous(), "dweights must be contiguous");
    a.weights_mean = dweights->dim() == 3;
    const int64_t heads = a.weights_mean ? 1 : a.H;
    a.dweights = {dweights->data_ptr(), heads * a.N * a.M, a.weights_mean ? 0 : a.N * a.M, a.M, 1,
                  dtype_of(*dweights)};
  }
  make_dq(a, dq, acc, buffers);
  a.dk = strided(dk, a.k.starts);
  zero_outside(dk, a.dk, a.B);
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

STABLE_TORCH_LIBRARY(mmfast, m) {
  m.def(mmfast::schemas::kCrossAttentionFwd);
  m.def(mmfast::schemas::kCrossAttentionBwd);
  m.def(mmfast::schemas::kCrossAttentionProbs);
  m.def(mmfast::schemas::kCrossAttentionProbsBwd);
}

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("cross_attention_fwd", TORCH_BOX(&mmfast::forward));
  m.impl("cross_attention_bwd", TORCH_BOX(&mmfast::backward));
  m.impl("cross_attention_probs", TORCH_BOX(&mmfast::probabilities));
  m.impl("cross_attention_probs_bwd", TORCH_BOX(&mmfast::probabilities_backward));
}
