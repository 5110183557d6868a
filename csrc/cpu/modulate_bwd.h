// modulate, backward, in one pass over the incoming gradients, h and x. Statistics are recomputed:
// reading the row is needed anyway, and in cache a sum costs next to nothing.
//
// With n the normalised row, d = dout and f = weight * (1 + scale): the gradient of n is dn = d *
// f, that of h is rstd * (dn - mean(dn) - n * mean(dn * n)) + dh, and the gradients of weight,
// bias, scale and shift are all made of two sums over rows, of d * n and of d. A scale by row takes
// part in these sums (d = dout * (1 + scale), f = weight); its own gradient is written row by row.
#pragma once
#include "modulate_fwd.h"

namespace {

// norm none, from storage to storage: to = d * factor, and the sums over rows.
template <class S>
MMFAST_NOINLINE void put_film(const typename S::Bits* d, const typename S::Bits* row,
                              const typename S::Acc* factor, ColumnSums<typename S::Acc> columns,
                              typename S::Bits* to, int64_t count, bool stream, const void* next,
                              const void* next_too) {
  using Acc = typename S::Acc;
  using P = Plain<Acc>;
  each_vector<S>(count, stream ? to : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
    ahead(next, i * int64_t(sizeof(typename S::Bits)));
    ahead(next_too, i * int64_t(sizeof(typename S::Bits)));
    const Vec<Acc> g = at.template load<S>(d + i), n = at.template load<S>(row + i);
    at.template store<S>(to + i, g * at.template load<P>(factor + i));
    keep(at, columns.d_n + i, at.template load<P>(columns.d_n + i) + g * n);
    keep(at, columns.d + i, at.template load<P>(columns.d + i) + g);
  });
}
template <class SD, class ST>
MMFAST_NOINLINE void put_product(const typename SD::Bits* d, const typename SD::Acc* factor,
                                 typename ST::Bits* to, int64_t count, bool stream) {
  using Acc = typename SD::Acc;
  each_vector<ST>(count, stream ? to : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
    at.template store<ST>(to + i,
                          at.template load<SD>(d + i) * at.template load<Plain<Acc>>(factor + i));
  });
}

// What becomes of the gate's gradient.
enum class GateGradient { NO_GATE, NOT_NEEDED, SUMMED, BY_ROW };

// From t + dh, the gradient of h: dresidual, dx = gate * it, and dgate = it * x: added to `dgate`,
// or left in `t`.
template <class S, bool DH, GateGradient GATE>
MMFAST_NOINLINE void put_branches(typename S::Acc* t, const typename S::Bits* dh,
                                  const typename S::Acc* gate, const typename S::Bits* x,
                                  typename S::Bits* dresidual, typename S::Bits* dx,
                                  typename S::Acc* dgate, int64_t count, bool stream) {
  using Acc = typename S::Acc;
  using P = Plain<Acc>;
  const void* past_caches = nullptr;
  if (stream && (dresidual == nullptr || dx == nullptr || same_alignment(dresidual, dx)))
    past_caches = dx != nullptr ? dx : dresidual;
  each_vector<S>(count, past_caches, [&](auto at, int64_t i) MMFAST_LAMBDA {
    Vec<Acc> v = at.template load<P>(t + i);
    if constexpr (DH) v += at.template load<S>(dh + i);
    if (dresidual != nullptr) at.template store<S>(dresidual + i, v);
    if (dx != nullptr) {
      if constexpr (GATE == GateGradient::NO_GATE)
        at.template store<S>(dx + i, v);
      else
        at.template store<S>(dx + i, v * at.template load<P>(gate + i));
    }
    if constexpr (GATE == GateGradient::SUMMED)
      keep(at, dgate + i, at.template load<P>(dgate + i) + v * at.template load<S>(x + i));
    if constexpr (GATE == GateGradient::BY_ROW) keep(at, t + i, v * at.template load<S>(x + i));
  });
}

template <class S>
struct ModulateBackward {
  using Acc = typename S::Acc;
  using Bits = typename S::Bits;
  using P = Plain<Acc>;

  const ModulateArgs& a;
  const int64_t C;
  RowArena<Acc> arena;
  Acc *v, *d, *t, *one;
  Sides<Acc> sides;
  ColumnSums<Acc> columns;
  Acc *sum_dout = nullptr, *sum_gate = nullptr;

  ModulateBackward(const ModulateArgs& args, void* scratch)
      : a(args),
        C(args.shape.columns),
        arena(scratch, C),
        v(arena.take()),
        d(arena.take()),
        t(arena.take()),
        one(arena.take()),
        sides(arena) {}

  void put_any(const RowOperand& to, Place at, const Acc* row) const {
    write_row<Acc>(to.dtype, any_row_at(to, at), row, C, Acc(1));
  }
  // The row that the next place brings; h's where there is no such operand.
  const Bits* coming(const RowOperand& x, Place next) const {
    return row_at<const Bits>(x.data != nullptr ? x : a.h, next);
  }
  bool shift_row_wanted() const { return a.shift_by_row && a.dshift.data != nullptr; }
  bool scale_row_wanted() const { return a.scale_by_row && a.dscale.data != nullptr; }

  // dout of the row in scratch, times a scale by row; gradients of side tensors that are by_row.
  __attribute__((noinline)) void take_dout(Place at, const Acc* row, const Moments<Acc>& m) const {
    copy_row(a.dout, at, d, C);
    if (shift_row_wanted()) put_any(a.dshift, at, d);
    if (sum_dout != nullptr)
      each_vector<P>(C, [&](auto part, int64_t i) MMFAST_LAMBDA {
        keep(part, sum_dout + i,
             part.template load<P>(sum_dout + i) + part.template load<P>(d + i));
      });
    if (!a.scale_by_row) return;
    if (scale_row_wanted()) {
      each_vector<P>(C, [&](auto part, int64_t i) MMFAST_LAMBDA {
        const Vec<Acc> n = m.normal(part.template load<P>(row + i));
        const Vec<Acc> u =
            n * part.template load<P>(sides.weight + i) + part.template load<P>(sides.bias + i);
        keep(part, t + i, part.template load<P>(d + i) * u);
      });
      put_any(a.dscale, at, t);
    }
    one_plus(a.scale, at, one, C);
    multiply_row(d, one, C);
  }

  // From d to the gradient of h, without dh; and the sums over rows.
  template <class SD, class ST>
  MMFAST_MEMBER void through_norm(const typename SD::Bits* grad, const Acc* row,
                                  const Moments<Acc>& m, typename ST::Bits* to, bool stream,
                                  Place next) const {
    const Bits *next_dout = coming(a.dout, next), *next_h = coming(a.h, next);
    Means<Acc> means;
    if (columns.d != nullptr)
      means = take_gradient<SD, true>(grad, row, m, sides.factor, columns, C, next_dout, next_h);
    else if (a.norm != mmfast::kNormNone)
      means = take_gradient<SD, false>(grad, row, m, sides.factor, columns, C, next_dout, next_h);
    if (to == nullptr) return;
    if (a.norm == mmfast::kNormNone) return put_product<SD, ST>(grad, sides.factor, to, C, stream);
    if (a.norm == mmfast::kNormRms) means.dn = 0;
    put_gradient<SD, ST>(grad, row, m, means, sides.factor, to, C, stream, coming(a.dh, next),
                         coming(a.x, next));
  }

  template <bool DH>
  void branches(Place at) const {
    const Bits* dh = DH ? row_at<const Bits>(a.dh, at) : nullptr;
    const Bits* x = row_at<const Bits>(a.x, at);
    Bits* dresidual = a.dresidual.data != nullptr ? row_at<Bits>(a.dresidual, at) : nullptr;
    Bits* dx = a.dx.data != nullptr ? row_at<Bits>(a.dx, at) : nullptr;
    const bool stream = a.past_caches;
    using G = GateGradient;
    if (a.gate.data == nullptr) {
      put_branches<S, DH, G::NO_GATE>(t, dh, nullptr, x, dresidual, dx, nullptr, C, stream);
    } else if (sum_gate != nullptr) {
      put_branches<S, DH, G::SUMMED>(t, dh, sides.gate, x, dresidual, dx, sum_gate, C, stream);
    } else if (a.gate_by_row && a.dgate.data != nullptr) {
      put_branches<S, DH, G::BY_ROW>(t, dh, sides.gate, x, dresidual, dx, nullptr, C, stream);
      put_any(a.dgate, at, t);
    } else {
      put_branches<S, DH, G::NOT_NEEDED>(t, dh, sides.gate, x, dresidual, dx, nullptr, C, stream);
    }
  }

  // Only h has a gradient: nothing comes through the norm.
  void row_without_dout(Place at) const {
    fill_row(t, C, Acc(0));
    if (scale_row_wanted()) put_any(a.dscale, at, t);
    if (shift_row_wanted()) put_any(a.dshift, at, t);
    if (a.row_results()) branches<true>(at);
  }

  void row(Place at, Place next) const {
    if (a.dout.data == nullptr) return row_without_dout(at);
    const Bits* h = row_at<const Bits>(a.h, at);
    const Bits* dout = row_at<const Bits>(a.dout, at);
    const bool in_scratch = a.scale_by_row || shift_row_wanted();
    Bits* dx = a.dx.data != nullptr && !a.residual_given ? row_at<Bits>(a.dx, at) : nullptr;
    if (a.norm == mmfast::kNormNone && dx != nullptr && !in_scratch) {
      if (columns.d == nullptr) return put_product<S, S>(dout, sides.factor, dx, C, a.past_caches);
      return put_film<S>(dout, h, sides.factor, columns, dx, C, a.past_caches, coming(a.dout, next),
                         coming(a.h, next));
    }
    const Acc* row = v;
    Moments<Acc> m;
    if constexpr (kIsPlain<S>) {
      row = h;
      m = moments_of(a, row, a.norm == mmfast::kNormLayer ? row_sum<S>(h, C) : 0.0);
    } else {
      m = moments_of(a, row, take_row<S>(h, v, C));
    }
    if (in_scratch) take_dout(at, row, m);
    if (a.residual_given) {
      Acc* to = a.row_results() ? t : nullptr;
      if (in_scratch)
        through_norm<P, P>(d, row, m, to, false, next);
      else
        through_norm<S, P>(dout, row, m, to, false, next);
      if (to == nullptr) return;
      if (a.dh.data != nullptr)
        branches<true>(at);
      else
        branches<false>(at);
    } else if (in_scratch) {
      through_norm<P, S>(d, row, m, dx, a.past_caches, next);
    } else {
      through_norm<S, S>(dout, row, m, dx, a.past_caches, next);
    }
  }

  void run(int64_t task) {
    const int64_t group = task / a.chunks;
    const int64_t from = task % a.chunks * a.chunk_rows;
    const int64_t to = min64(from + a.chunk_rows, a.group_rows);
    const int64_t first = group * a.group_rows + from;
    Place at{first / a.shape.n1, first % a.shape.n1};
    const auto start = [&](void* all) { return start_sums<Acc>(all, task, a.sum_stride, C); };
    columns = {start(a.sum_d_n), start(a.sum_d)};
    sum_dout = start(a.sum_dout);
    sum_gate = start(a.sum_gate);
    if (a.weight.data != nullptr || a.scale_by_row) take_weights(a, sides);
    if (a.scale_by_row)
      memcpy(sides.factor, sides.weight, size_t(C) * sizeof(Acc));
    else
      make_factor(a, at, sides);
    if (a.gate.data != nullptr && !a.gate_by_row) copy_row(a.gate, at, sides.gate, C);
    for (int64_t r = from; r < to; ++r) {
      const Place next = r + 1 < to ? at.after(a.shape) : at;
      if (a.gate_by_row) copy_row(a.gate, at, sides.gate, C);
      row(at, next);
      at = next;
    }
    end_streaming(a.past_caches);
  }
};

template <class S>
int64_t modulate_bwd_scratch(const ModulateArgs& a) {
  return ModulateBackward<S>(a, nullptr).arena.used;
}
template <class S>
void modulate_bwd(const ModulateArgs& a, int64_t task, void* scratch) {
  ModulateBackward<S>(a, scratch).run(task);
}

}  // namespace
