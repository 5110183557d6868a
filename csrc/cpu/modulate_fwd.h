// modulate, forward: out = (norm(h) * weight + bias) * (1 + scale) + shift, h = x or
// residual + gate * x. What does not depend on the row becomes one factor and one addend, once a
// task; a row is read from memory once and then lives in the first caches.
#pragma once
#include "modulate.h"
#include "row_norm.h"

namespace {

using mmfast::ModulateArgs;
using mmfast::RowOperand;

// The side tensors of a group, or of a row where one is by_row.
template <class Acc>
struct Sides {
  Acc *factor, *addend, *gate, *weight, *bias;
  explicit Sides(RowArena<Acc>& arena)
      : factor(arena.take()),
        addend(arena.take()),
        gate(arena.take()),
        weight(arena.take()),
        bias(arena.take()) {}
};

// f(part, i, v) for the vectors v of a row of any storage.
template <class Acc, class F>
MMFAST_INLINE void with_row(const RowOperand& x, Place at, int64_t count, const F& f) {
  WithStore<Acc>::call(x.dtype, [&](auto tag) MMFAST_LAMBDA {
    using S = decltype(tag);
    const auto* p = row_at<const typename S::Bits>(x, at);
    each_vector<Plain<Acc>>(count, [&](auto part, int64_t i)
                                       MMFAST_LAMBDA { f(part, i, part.template load<S>(p + i)); });
  });
}
// 1 + scale, or 1 without one.
template <class Acc>
MMFAST_NOINLINE void one_plus(const RowOperand& scale, Place at, Acc* to, int64_t count) {
  if (scale.data == nullptr) return fill_row(to, count, Acc(1));
  with_row<Acc>(scale, at, count, [&](auto part, int64_t i, Vec<Acc> s) MMFAST_LAMBDA {
    keep(part, to + i, Acc(1) + s);
  });
}
// to *= x
template <class Acc>
MMFAST_NOINLINE void multiply_row(Acc* to, const Acc* x, int64_t count) {
  using P = Plain<Acc>;
  each_vector<P>(count, [&](auto part, int64_t i) MMFAST_LAMBDA {
    keep(part, to + i, part.template load<P>(to + i) * part.template load<P>(x + i));
  });
}
// Weight and bias in scratch, where something by row needs them; 1 and 0 where they are absent.
template <class Acc>
MMFAST_NOINLINE void take_weights(const ModulateArgs& a, const Sides<Acc>& s) {
  const int64_t C = a.shape.columns;
  fill_row(s.weight, C, Acc(1));
  fill_row(s.bias, C, Acc(0));
  if (a.weight.data != nullptr) copy_row(a.weight, Place{0, 0}, s.weight, C);
  if (a.bias.data != nullptr) copy_row(a.bias, Place{0, 0}, s.bias, C);
}
// weight * (1 + scale)
template <class Acc>
MMFAST_INLINE void make_factor(const ModulateArgs& a, Place at, const Sides<Acc>& s) {
  one_plus(a.scale, at, s.factor, a.shape.columns);
  if (a.weight.data != nullptr) multiply_row(s.factor, s.weight, a.shape.columns);
}
// (n * weight + bias) * (1 + scale) + shift = n * factor + addend
template <class Acc>
MMFAST_NOINLINE void make_coefficients(const ModulateArgs& a, Place at, const Sides<Acc>& s) {
  using P = Plain<Acc>;
  const int64_t C = a.shape.columns;
  one_plus(a.scale, at, s.factor, C);
  if (a.shift.data != nullptr)
    copy_row(a.shift, at, s.addend, C);
  else
    fill_row(s.addend, C, Acc(0));
  if (a.bias.data != nullptr)
    each_vector<P>(C, [&](auto part, int64_t i) MMFAST_LAMBDA {
      keep(part, s.addend + i,
           part.template load<P>(s.bias + i) * part.template load<P>(s.factor + i) +
               part.template load<P>(s.addend + i));
    });
  if (a.weight.data != nullptr) multiply_row(s.factor, s.weight, C);
}

template <class Acc>
MMFAST_INLINE Moments<Acc> moments_of(const ModulateArgs& a, const Acc* row, double sum) {
  if (a.norm == mmfast::kNormLayer) return layer_moments(row, a.shape.columns, sum, a.eps);
  if (a.norm == mmfast::kNormRms)
    return rms_moments<Acc>(a.shape.columns, row_squares<Plain<Acc>>(row, a.shape.columns), a.eps);
  return {};
}

// h = residual + gate * x, rounded to storage, into memory and scratch. Returns its sum.
template <class S, bool GATE>
MMFAST_NOINLINE double add_branch(const typename S::Bits* residual, const typename S::Bits* x,
                                  const typename S::Acc* gate, typename S::Bits* h,
                                  typename S::Acc* to, int64_t count, bool stream) {
  using Acc = typename S::Acc;
  using P = Plain<Acc>;
  Vec<Acc> sum = {};
  each_vector<S>(count, stream ? h : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
    Vec<Acc> v = at.template load<S>(x + i);
    if constexpr (GATE) v = at.template load<P>(gate + i) * v;
    v = Rounded<S>::settle(at.template load<S>(residual + i) + v);
    at.template store<Rounded<S>>(h + i, v);
    keep(at, to + i, v);
    sum += v;
  });
  return double(lane_sum(sum));
}

template <class S>
struct ModulateForward {
  using Acc = typename S::Acc;
  using Bits = typename S::Bits;

  const ModulateArgs& a;
  RowArena<Acc> arena;
  Acc* v;
  Sides<Acc> sides;

  ModulateForward(const ModulateArgs& args, void* scratch)
      : a(args), arena(scratch, args.shape.columns), v(arena.take()), sides(arena) {}

  MMFAST_MEMBER void row(Place at, Place next) const {
    const int64_t C = a.shape.columns;
    const Bits* x = row_at<const Bits>(a.x, at);
    const Bits* next_x = row_at<const Bits>(a.x, next);
    Bits* out = row_at<Bits>(a.out, at);
    if (a.residual.data != nullptr) {
      const Bits* residual = row_at<const Bits>(a.residual, at);
      Bits* h = row_at<Bits>(a.h, at);
      const double sum =
          a.gate.data != nullptr
              ? add_branch<S, true>(residual, x, sides.gate, h, v, C, a.past_caches)
              : add_branch<S, false>(residual, x, sides.gate, h, v, C, a.past_caches);
      put_normal<Plain<Acc>, S>(v, moments_of(a, v, sum), sides.factor, sides.addend, out, C,
                                a.past_caches, next_x, row_at<const Bits>(a.residual, next));
    } else if (kIsPlain<S> || a.norm == mmfast::kNormNone) {
      Moments<Acc> m;
      if constexpr (kIsPlain<S>)
        m = moments_of(a, x, a.norm == mmfast::kNormLayer ? row_sum<S>(x, C) : 0.0);
      put_normal<S, S>(x, m, sides.factor, sides.addend, out, C, a.past_caches, next_x, next_x);
    } else {
      const Moments<Acc> m = moments_of(a, v, take_row<S>(x, v, C));
      put_normal<Plain<Acc>, S>(v, m, sides.factor, sides.addend, out, C, a.past_caches, next_x,
                                next_x);
    }
  }

  void run(int64_t task) const {
    const int64_t group = task / a.chunks;
    const int64_t from = task % a.chunks * a.chunk_rows;
    const int64_t to = min64(from + a.chunk_rows, a.group_rows);
    const int64_t first = group * a.group_rows + from;
    Place at{first / a.shape.n1, first % a.shape.n1};
    const bool by_row = a.scale_by_row || a.shift_by_row;
    if (a.weight.data != nullptr || a.bias.data != nullptr) take_weights(a, sides);
    if (!by_row) make_coefficients(a, at, sides);
    if (a.gate.data != nullptr && !a.gate_by_row) copy_row(a.gate, at, sides.gate, a.shape.columns);
    for (int64_t r = from; r < to; ++r) {
      const Place next = r + 1 < to ? at.after(a.shape) : at;
      if (by_row) make_coefficients(a, at, sides);
      if (a.gate_by_row) copy_row(a.gate, at, sides.gate, a.shape.columns);
      row(at, next);
      at = next;
    }
    end_streaming(a.past_caches);
  }
};

template <class S>
int64_t modulate_fwd_scratch(const ModulateArgs& a) {
  return ModulateForward<S>(a, nullptr).arena.used;
}
template <class S>
void modulate_fwd(const ModulateArgs& a, int64_t task, void* scratch) {
  ModulateForward<S>(a, scratch).run(task);
}

}  // namespace
