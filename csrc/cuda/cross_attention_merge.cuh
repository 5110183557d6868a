// out = the sum over splits of 2^(lse_s - lse) part_s, lse = log2 of the sum of 2^lse_s, in the
// order of the splits: the same bits every time. A thread has four columns of a row.
#pragma once
#include "attention_rules.cuh"
#include "cross_attention_fwd.h"
#include "launch.cuh"

namespace mmfast {

constexpr int kMergeThreads = 128;

template <class T>
MMFAST_DEVICE void store_merged(const AttentionArgs& a, T* to, int32_t c, const float (&x)[4]) {
  if (a.out.wide && sizeof(T) == 4) {
    store_global(reinterpret_cast<Vec4*>(to + c),
                 Vec4{{as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])}});
  } else if (a.out.wide) {
    if constexpr (sizeof(T) == 2)
      store_global(reinterpret_cast<Vec2*>(to + c),
                   Vec2{{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3])}});
  } else {
    for (int e = 0; e < 4 && c + e < a.Dv; ++e) store_global(to + c + e, from_float<T>(x[e]));
  }
}

template <class T>
MMFAST_KERNEL(kMergeThreads, 4)
cross_attention_merge_kernel(MMFAST_PARAM(FwdArgs) args) {
  const AttentionArgs& a = args.a;
  const AttentionRules& rules = a.rules;
  const int64_t rows = int64_t(rules.B) * rules.H * rules.N;
  const int32_t quads = args.pitch / 4;
  const int64_t i = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  const int64_t row = i / quads;
  const int32_t c = int32_t(i % quads) * 4;
  if (row >= rows) return;

  float top = kMinusInfinity;
  for (int32_t s = 0; s < args.splits; ++s)
    top = fmaxf(top, load_global(args.part_lse + s * rows + row));
  const float base = top == kMinusInfinity ? 0.0f : top;
  float total = 0, x[4] = {0, 0, 0, 0};
  for (int32_t s = 0; s < args.splits; ++s) {
    const int64_t at = s * rows + row;
    const float weight = exp2_approx(load_global(args.part_lse + at) - base);
    total += weight;
    const Vec4 piece = load_global(reinterpret_cast<const Vec4*>(args.parts + at * args.pitch + c));
    MMFAST_UNROLL
    for (int e = 0; e < 4; ++e) x[e] += weight * as_float(piece.x[e]);
  }

  const bool dead = total == 0;
  const int32_t n = int32_t(row % rules.N), h = int32_t(row / rules.N % rules.H);
  const int32_t b = int32_t(row / rules.N / rules.H), at = start_of(rules.q_starts, b) + n;
  MMFAST_UNROLL
  for (int e = 0; e < 4; ++e) {
    x[e] = dead ? 0.0f : x[e] / total;
    if (a.gate.data != nullptr && !dead && c + e < a.Dv) x[e] *= gate_of(a.gate, b, h, at, c + e);
  }
  if (n < query_places(rules, lengths(rules, b)))
    store_merged<T>(a, row_of<T>(a.out, b, h, at), c, x);
  if (c == 0) store_global(a.lse + row, dead ? kMinusInfinity : (base + log2_approx(total)) * kLn2);
}

}  // namespace mmfast
