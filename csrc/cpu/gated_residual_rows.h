// The elementwise passes of gated_residual: the forward, dy, and the gradient of a gate like x.
#pragma once
#include "activations.h"
#include "gated_residual.h"
#include "spans.h"

namespace {

using mmfast::GatedResidualArgs;
using mmfast::RowOperand;

MMFAST_INLINE bool row_is_on(const GatedResidualArgs& x, int64_t i0, int64_t i1) {
  return x.mask.data == nullptr || *row_at<const uint8_t>(x.mask, i0, i1) != 0;
}

// A gate has the dtype of the data or float: f(tag of the gate's storage).
template <class S, class F>
MMFAST_INLINE void with_gate_storage(const GatedResidualArgs& x, const F& f) {
  if (x.gate.dtype == x.dtype)
    f(S{});
  else
    f(Plain<typename S::Acc>{});
}

// act(gate) of the row at hand, made once for the rows that share it.
template <class S, class A>
class GateRows {
 public:
  using T = typename S::Acc;
  GateRows(const GatedResidualArgs& x, void* scratch) : x_(x), row_(static_cast<T*>(scratch)) {}

  MMFAST_MEMBER Vec<T> one(int64_t i0, int64_t i1) {
    const int64_t at = i0 * x_.gate.s0 + i1 * x_.gate.s1;
    if (at != made_at_) {
      one_ = A::template value<T>(splat(read_one<T>(x_.gate.dtype, x_.gate.data, at)));
      made_at_ = at;
    }
    return one_;
  }
  // count values from column c on
  MMFAST_MEMBER const T* many(int64_t i0, int64_t i1, int64_t c, int64_t count) {
    const int64_t at = i0 * x_.gate.s0 + i1 * x_.gate.s1 + c;
    if (at == made_at_) return row_;
    with_gate_storage<S>(x_, [&](auto tag) MMFAST_LAMBDA {
      using G = decltype(tag);
      const auto* gate = row_at<const typename G::Bits>(x_.gate, i0, i1, c);
      each_vector<Plain<T>>(count, [&](auto step, int64_t i) MMFAST_LAMBDA {
        const Vec<T> g = A::template value<T>(step.template load<G>(gate + i));
        step.template store<Plain<T>>(row_ + i, g);
      });
    });
    made_at_ = at;
    return row_;
  }

 private:
  const GatedResidualArgs& x_;
  T* row_;
  Vec<T> one_ = {};
  int64_t made_at_ = -1;
};

// Whether neighbouring rows share a row of the gate, so that its activation is worth keeping.
MMFAST_INLINE bool gate_row_shared(const GatedResidualArgs& x) {
  return x.shape.n1 > 1 ? x.gate.s1 == 0 : x.gate.s0 == 0;
}

// to = g * y, plus x in the forward
template <class S, bool ADD, class F>
MMFAST_INLINE void gated_row(const GatedResidualArgs& args, const typename S::Bits* x,
                             const typename S::Bits* y, typename S::Bits* to, int64_t count,
                             const F& gate) {
  using T = typename S::Acc;
  each_element<S>(count, args.streamed ? to : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
    const Vec<T> g = gate(at, i), v = at.template load<S>(y + i);
    if constexpr (ADD)
      at.template store<S>(to + i, g * v + at.template load<S>(x + i));
    else
      at.template store<S>(to + i, g * v);
  });
}

// The row of a row_mask that is False: x as it is, or zeros.
template <class S, bool ADD>
MMFAST_INLINE void masked_row(const GatedResidualArgs& args, const typename S::Bits* x,
                              typename S::Bits* to, int64_t count) {
  using T = typename S::Acc;
  each_element<S>(count, args.streamed ? to : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
    if constexpr (ADD)
      at.template store<S>(to + i, at.template load<S>(x + i));
    else
      at.template store<S>(to + i, Vec<T>{});
  });
}

// ADD: out = x + act(gate) * y. Otherwise dy = act(gate) * dout.
template <class S, class A, bool ADD>
void gated_rows(const GatedResidualArgs& args, int64_t task, void* scratch) {
  using T = typename S::Acc;
  using Bits = typename S::Bits;
  const RowOperand& from = ADD ? args.y : args.dout;
  const RowOperand& result = ADD ? args.out : args.dy;
  GateRows<S, A> gates(args, scratch);
  each_row(args.shape, args.tasks, task, [&](int64_t i0, int64_t i1, int64_t c, int64_t count) {
    const Bits* x = ADD ? row_at<const Bits>(args.x, i0, i1, c) : nullptr;
    const Bits* y = row_at<const Bits>(from, i0, i1, c);
    Bits* to = row_at<Bits>(result, i0, i1, c);
    if (!row_is_on(args, i0, i1)) {
      masked_row<S, ADD>(args, x, to, count);
    } else if (args.gate.sc == 0) {
      const Vec<T> g = gates.one(i0, i1);
      gated_row<S, ADD>(args, x, y, to, count, [&](auto, int64_t) MMFAST_LAMBDA { return g; });
    } else if (gate_row_shared(args)) {
      const T* g = gates.many(i0, i1, c, count);
      gated_row<S, ADD>(args, x, y, to, count, [&](auto at, int64_t i) MMFAST_LAMBDA {
        return at.template load<Plain<T>>(g + i);
      });
    } else {
      with_gate_storage<S>(args, [&](auto tag) MMFAST_LAMBDA {
        using G = decltype(tag);
        const auto* g = row_at<const typename G::Bits>(args.gate, i0, i1, c);
        gated_row<S, ADD>(args, x, y, to, count, [&](auto at, int64_t i) MMFAST_LAMBDA {
          return A::template value<T>(at.template load<G>(g + i));
        });
      });
    }
  });
  end_streaming(args.streamed);
}

// dgate = act'(gate) * dout * y and dy = act(gate) * dout, element by element.
template <class S, class G, class A>
void gated_full_rows(const GatedResidualArgs& args, int64_t task) {
  using T = typename S::Acc;
  using Bits = typename S::Bits;
  using GateBits = typename G::Bits;
  each_row(args.shape, args.tasks, task, [&](int64_t i0, int64_t i1, int64_t c, int64_t count) {
    const Bits* dout = row_at<const Bits>(args.dout, i0, i1, c);
    const Bits* y = row_at<const Bits>(args.y, i0, i1, c);
    const GateBits* gate = row_at<const GateBits>(args.gate, i0, i1, c);
    GateBits* dgate = row_at<GateBits>(args.dgate, i0, i1, c);
    Bits* dy = args.dy.data != nullptr ? row_at<Bits>(args.dy, i0, i1, c) : nullptr;
    const bool on = row_is_on(args, i0, i1);
    // Both results' vectors are aligned where they go past the caches.
    const bool streamed =
        args.streamed && (dy == nullptr || (sizeof(Bits) == sizeof(GateBits)
                                                ? same_alignment(dy, dgate)
                                                : uintptr_t(dy) % kVectorBytes == 0 &&
                                                      uintptr_t(dgate) % kVectorBytes == 0));
    each_element<G>(count, streamed ? dgate : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
      Vec<T> slope = {}, value = {};
      if (on) {
        const ValueSlope<T> act = A::template both<T>(at.template load<G>(gate + i));
        const Vec<T> d = at.template load<S>(dout + i);
        slope = d * at.template load<S>(y + i) * act.slope;
        value = d * act.value;
      }
      at.template store<G>(dgate + i, slope);
      if (dy != nullptr) at.template store<S>(dy + i, value);
    });
  });
  end_streaming(args.streamed);
}

}  // namespace
