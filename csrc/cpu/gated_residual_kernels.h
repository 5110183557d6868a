// Gathers the passes of gated_residual into the table of one instruction set.
#pragma once
#include "gated_residual_sums.h"

namespace {

// f(storage tag, activation tag)
template <class F>
MMFAST_INLINE void with_gate(const GatedResidualArgs& x, const F& f) {
  with_storage(x.dtype, [&](auto s) MMFAST_LAMBDA {
    if (x.activation == 0)
      f(s, Tanh{});
    else if (x.activation == 1)
      f(s, Sigmoid{});
    else
      f(s, Identity{});
  });
}

void gated_fwd(const GatedResidualArgs& x, int64_t task, void* scratch) {
  with_gate(x,
            [&](auto s, auto a) { gated_rows<decltype(s), decltype(a), true>(x, task, scratch); });
}
void gated_bwd_dy(const GatedResidualArgs& x, int64_t task, void* scratch) {
  with_gate(x,
            [&](auto s, auto a) { gated_rows<decltype(s), decltype(a), false>(x, task, scratch); });
}
void gated_bwd_full(const GatedResidualArgs& x, int64_t task, void*) {
  with_gate(x, [&](auto s, auto a) {
    with_gate_storage<decltype(s)>(
        x, [&](auto g) { gated_full_rows<decltype(s), decltype(g), decltype(a)>(x, task); });
  });
}
void gated_bwd_sums(const GatedResidualArgs& x, int64_t task, void* scratch) {
  with_gate(x, [&](auto s, auto a) {
    if (x.gate.sc != 0)
      gated_column_sums<decltype(s), decltype(a)>(x, task, scratch);
    else
      gated_dots<decltype(s), decltype(a)>(x, task);
  });
}
void gated_bwd_finish(const GatedResidualArgs& x, int64_t task, void*) {
  with_gate(x, [&](auto s, auto a) { gated_finish<decltype(s), decltype(a)>(x, task); });
}

constexpr mmfast::GatedResidualKernels kGatedResidual = {gated_fwd, gated_bwd_dy, gated_bwd_full,
                                                         gated_bwd_sums, gated_bwd_finish};

}  // namespace
