// The pass of the backward over rows where there is a gate: the gradient through it, dgate, delta.
#pragma once
#include "cross_attention_bwd.h"

namespace {

template <class C>
int64_t bwd_rows_tasks(const CrossAttentionArgs& a) {
  return a.B * a.H * ceil_div(a.N, kRowsPerTask);
}
template <class C>
int64_t bwd_rows_scratch(const CrossAttentionArgs& a) {
  return 4 *
         round_up(round_up(a.Dv, lanes<typename C::Acc>()) * int64_t(sizeof(typename C::Acc)), 64);
}

template <class C>
MMFAST_NOINLINE void bwd_rows_run(const CrossAttentionArgs& a, int64_t task, void* base) {
  using Acc = typename C::Acc;
  constexpr int L = lanes<Acc>();
  const int64_t cols = round_up(a.Dv, L);
  Arena arena{static_cast<char*>(base)};
  Acc *go = arena.take<Acc>(cols), *o = arena.take<Acc>(cols), *gate = arena.take<Acc>(cols),
      *dgate = arena.take<Acc>(cols);
  const int64_t blocks = ceil_div(a.N, kRowsPerTask);
  const int64_t bh = task / blocks, b = bh / a.H, h = bh % a.H;
  const int64_t begin = task % blocks * kRowsPerTask;
  for (int64_t n = begin; n < min64(begin + kRowsPerTask, a.N); ++n) {
    const int64_t at = bh * a.N + n;
    Acc* gated = static_cast<Acc*>(a.dout_gated.data) + a.dout_gated.offset(b, h, n);
    if (!has_query(a, b, n)) {
      static_cast<Acc*>(a.delta)[at] = 0;
      memset(gated, 0, size_t(a.Dv) * sizeof(Acc));
      continue;
    }
    const bool blind = static_cast<const Acc*>(a.lse)[at] == Acc(-__builtin_inf());
    Acc delta = 0;
    if (!blind) {
      read_row<Acc>(a.dout_raw.dtype, strided_row<C>(a.dout_raw, b, h, n), go, a.Dv, cols);
      read_row<Acc>(a.out.dtype, strided_row<C>(a.out, b, h, n), o, a.Dv, cols);
      Vec<Acc> sum{};
      for (int64_t d = 0; d < cols; d += L) sum += load(go + d) * load(o + d);
      delta = reduce_add<Acc>(sum);
    }
    const int64_t gate_at = a.gate.offset(b, h, n);
    const bool wide = a.gate.sm != 0;
    if (wide) {
      read_row<Acc>(a.gate.dtype, byte_offset(a.gate.data, a.gate.dtype, gate_at), gate, a.Dv,
                    cols);
    } else {
      const Acc g = read_one<Acc>(a.gate.dtype, a.gate.data, gate_at);
      for (int64_t d = 0; d < cols; ++d) gate[d] = g;
    }
    // 1 - sigmoid(g) is taken as sigmoid(-g): no cancellation where the gate is open.
    for (int64_t d = 0; d < cols; d += L) {
      const Vec<Acc> open = sigmoidv<Acc>(load(gate + d));
      const Vec<Acc> shut = sigmoidv<Acc>(-load(gate + d));
      store(dgate + d, blind ? Vec<Acc>{} : load(go + d) * load(o + d) * shut);
      store(go + d, blind ? Vec<Acc>{} : load(go + d) * open);
    }
    memcpy(gated, go, size_t(a.Dv) * sizeof(Acc));
    const int64_t row = a.gate.starts != nullptr ? a.gate.starts[b] + n : b * a.N + n;
    const int64_t out_at = row * a.H + h;
    if (wide) {
      write_row<Acc>(a.gate.dtype, byte_offset(a.dgate, a.gate.dtype, out_at * a.Dv), dgate, a.Dv,
                     Acc(1));
    } else {
      const Acc shut = sigmoidv<Acc>(splat<Acc>(-gate[0]))[0];
      write_one<Acc>(a.gate.dtype, a.dgate, out_at, blind ? Acc(0) : delta * shut);
    }
    if (!blind && a.dlse != nullptr) delta -= static_cast<const Acc*>(a.dlse)[at];
    static_cast<Acc*>(a.delta)[at] = delta;
  }
}

}  // namespace
