// Kernels of glu: one read of each tensor, one write of each result.
#pragma once
#include "activations.h"
#include "glu.h"
#include "spans.h"

namespace {

using mmfast::GluArgs;

template <class S, class A>
void glu_fwd_rows(const GluArgs& x, int64_t task) {
  using T = typename S::Acc;
  using Bits = typename S::Bits;
  each_row(x.shape, x.tasks, task, [&](int64_t i0, int64_t i1, int64_t c, int64_t count) {
    const Bits* a = row_at<const Bits>(x.a, i0, i1, c);
    const Bits* b = row_at<const Bits>(x.b, i0, i1, c);
    Bits* out = row_at<Bits>(x.out, i0, i1, c);
    each_element<S>(count, x.streamed ? out : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
      const Vec<T> act = A::template value<T, sizeof(Bits) == 2>(at.template load<S>(a + i));
      at.template store<S>(out + i, act * at.template load<S>(b + i));
    });
  });
  end_streaming(x.streamed);
}

template <class S, class A>
void glu_bwd_rows(const GluArgs& x, int64_t task) {
  using T = typename S::Acc;
  using Bits = typename S::Bits;
  each_row(x.shape, x.tasks, task, [&](int64_t i0, int64_t i1, int64_t c, int64_t count) {
    const Bits* dout = row_at<const Bits>(x.dout, i0, i1, c);
    const Bits* a = row_at<const Bits>(x.a, i0, i1, c);
    const Bits* b = row_at<const Bits>(x.b, i0, i1, c);
    Bits* da = row_at<Bits>(x.da, i0, i1, c);
    Bits* db = row_at<Bits>(x.db, i0, i1, c);
    const bool streamed = x.streamed && same_alignment(da, db);
    each_element<S>(count, streamed ? da : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
      const Vec<T> d = at.template load<S>(dout + i);
      const ValueSlope<T> act = A::template both<T>(at.template load<S>(a + i));
      at.template store<S>(da + i, d * at.template load<S>(b + i) * act.slope);
      at.template store<S>(db + i, d * act.value);
    });
  });
  end_streaming(x.streamed);
}

template <class S>
void glu_fwd_of(const GluArgs& x, int64_t task) {
  static constexpr decltype(&glu_fwd_rows<S, Silu>) of[mmfast::kGluActivations] = {
      glu_fwd_rows<S, Silu>, glu_fwd_rows<S, Gelu>,    glu_fwd_rows<S, GeluTanh>,
      glu_fwd_rows<S, Relu>, glu_fwd_rows<S, Sigmoid>, glu_fwd_rows<S, Identity>};
  of[x.activation](x, task);
}
template <class S>
void glu_bwd_of(const GluArgs& x, int64_t task) {
  static constexpr decltype(&glu_bwd_rows<S, Silu>) of[mmfast::kGluActivations] = {
      glu_bwd_rows<S, Silu>, glu_bwd_rows<S, Gelu>,    glu_bwd_rows<S, GeluTanh>,
      glu_bwd_rows<S, Relu>, glu_bwd_rows<S, Sigmoid>, glu_bwd_rows<S, Identity>};
  of[x.activation](x, task);
}

void glu_fwd(const GluArgs& x, int64_t task) {
  with_storage(x.dtype, [&](auto s) { glu_fwd_of<decltype(s)>(x, task); });
}
void glu_bwd(const GluArgs& x, int64_t task) {
  with_storage(x.dtype, [&](auto s) { glu_bwd_of<decltype(s)>(x, task); });
}

}  // namespace
