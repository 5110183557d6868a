// adaptation_gate: out = layer_norm(y) * weight + bias, y = z + alpha * h,
// alpha = min(beta * |z| / |h|, 1). z and h are read from memory once, forward and backward.
#pragma once
#include "adaptation_gate.h"
#include "row_norm.h"

namespace {

using mmfast::AdaptationGateArgs;

// How far h displaces z, and how that depends on both.
struct Displacement {
  bool moved = true;  // false: the row is masked, h is not read
  double alpha = 1;
  // With e = <dy, h>: alpha brings e * of_z * z to dz and e * of_h * h to dh.
  double of_z = 0, of_h = 0;
};

MMFAST_INLINE Displacement displacement(double z_squares, double h_squares, double beta) {
  Displacement d;
  const double z_size = sqrt(z_squares), h_size = sqrt(h_squares);
  const double ratio = beta * z_size / h_size;
  if (!(h_size > 0 && ratio < 1)) return d;
  d.alpha = ratio;
  d.of_z = z_size > 0 ? beta / (h_size * z_size) : 0.0;
  d.of_h = -ratio / h_squares;
  return d;
}

template <class S>
MMFAST_NOINLINE Displacement measure(const typename S::Bits* z, const typename S::Bits* h,
                                     int64_t count, double beta) {
  using Acc = typename S::Acc;
  double squares[2] = {};
  sum_over_row<Acc>(count, squares, [&](auto at, int64_t i, Vec<Acc>* acc) MMFAST_LAMBDA {
    const Vec<Acc> a = at.template load<S>(z + i), b = at.template load<S>(h + i);
    acc[0] += a * a;
    acc[1] += b * b;
  });
  return displacement(squares[0], squares[1], beta);
}

// y = z + alpha * h in scratch; returns its sum.
template <class S>
MMFAST_NOINLINE double displace(const typename S::Bits* z, const typename S::Bits* h,
                                typename S::Acc alpha, typename S::Acc* y, int64_t count) {
  using Acc = typename S::Acc;
  double sums[1] = {};
  sum_over_row<Acc>(count, sums, [&](auto at, int64_t i, Vec<Acc>* acc) MMFAST_LAMBDA {
    const Vec<Acc> v = at.template load<S>(z + i) + alpha * at.template load<S>(h + i);
    keep(at, y + i, v);
    acc[0] += v;
  });
  return sums[0];
}

template <class S>
MMFAST_NOINLINE double dot_row(const typename S::Acc* a, const typename S::Bits* b, int64_t count) {
  using Acc = typename S::Acc;
  double sums[1] = {};
  sum_over_row<Acc>(count, sums, [&](auto at, int64_t i, Vec<Acc>* acc) MMFAST_LAMBDA {
    acc[0] += at.template load<Plain<Acc>>(a + i) * at.template load<S>(b + i);
  });
  return sums[0];
}

// to = a * dy + b * x, while the row that comes next is fetched.
template <class S>
MMFAST_NOINLINE void put_mixed(const typename S::Acc* dy, typename S::Acc a,
                               const typename S::Bits* x, typename S::Acc b, typename S::Bits* to,
                               int64_t count, bool stream, const void* next) {
  using Acc = typename S::Acc;
  each_vector<S>(count, stream ? to : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
    ahead(next, i * int64_t(sizeof(typename S::Bits)));
    at.template store<S>(to + i,
                         at.template load<Plain<Acc>>(dy + i) * a + at.template load<S>(x + i) * b);
  });
}

template <class S>
struct AdaptationGateRows {
  using Acc = typename S::Acc;
  using Bits = typename S::Bits;
  using P = Plain<Acc>;

  const AdaptationGateArgs& a;
  const int64_t C;
  RowArena<Acc> arena;
  Acc *y, *dy, *weight, *bias;
  ColumnSums<Acc> columns;

  AdaptationGateRows(const AdaptationGateArgs& args, void* scratch)
      : a(args),
        C(args.shape.columns),
        arena(scratch, C),
        y(arena.take()),
        dy(arena.take()),
        weight(arena.take()),
        bias(arena.take()) {}

  bool is_moved(Place at) const {
    return a.row_mask.data == nullptr || *row_at<const uint8_t>(a.row_mask, at) != 0;
  }
  void take_weights() const {
    fill_row(weight, C, Acc(1));
    fill_row(bias, C, Acc(0));
    if (a.weight.data != nullptr) copy_row(a.weight, Place{0, 0}, weight, C);
    if (a.bias.data != nullptr) copy_row(a.bias, Place{0, 0}, bias, C);
  }
  // y of the row in scratch.
  MMFAST_MEMBER Displacement take_y(Place at, Moments<Acc>& m) const {
    const Bits* z = row_at<const Bits>(a.z, at);
    Displacement d;
    double sum;
    if (is_moved(at)) {
      const Bits* h = row_at<const Bits>(a.h, at);
      d = measure<S>(z, h, C, a.beta);
      sum = displace<S>(z, h, Acc(d.alpha), y, C);
    } else {
      d.moved = false;
      sum = take_row<S>(z, y, C);
    }
    m = layer_moments(y, C, sum, a.eps);
    return d;
  }

  void forward_row(Place at, Place next) const {
    Moments<Acc> m;
    take_y(at, m);
    put_normal<P, S>(y, m, weight, bias, row_at<Bits>(a.out, at), C, a.past_caches,
                     row_at<const Bits>(a.z, next), row_at<const Bits>(a.h, next));
  }

  void backward_row(Place at, Place next) const {
    Moments<Acc> m;
    const Displacement d = take_y(at, m);
    const Bits* dout = row_at<const Bits>(a.dout, at);
    const Bits* next_dout = row_at<const Bits>(a.dout, next);
    const Means<Acc> means =
        columns.d != nullptr
            ? take_gradient<S, true>(dout, y, m, weight, columns, C, next_dout, next_dout)
            : take_gradient<S, false>(dout, y, m, weight, columns, C, next_dout, next_dout);
    if (a.dz.data == nullptr && a.dh.data == nullptr) return;
    const Bits *next_z = row_at<const Bits>(a.z, next), *next_h = row_at<const Bits>(a.h, next);
    put_gradient<S, P>(dout, y, m, means, weight, dy, C, false, dout, dout);
    const Bits *z = row_at<const Bits>(a.z, at), *h = row_at<const Bits>(a.h, at);
    const bool through_alpha = d.of_z != 0 || d.of_h != 0;
    const double e = through_alpha ? dot_row<S>(dy, h, C) : 0.0;
    // Nothing may come of a row of h that is masked, whatever it holds.
    const Bits* of_h = d.moved ? h : z;
    if (a.dz.data != nullptr)
      put_row(row_at<Bits>(a.dz, at), Acc(1), z, Acc(e * d.of_z), through_alpha, next_z);
    if (a.dh.data != nullptr) {
      Bits* dh = row_at<Bits>(a.dh, at);
      if (d.moved)
        put_row(dh, Acc(d.alpha), of_h, Acc(e * d.of_h), through_alpha, next_h);
      else
        memset(dh, 0, size_t(C) * sizeof(Bits));
    }
  }

  void put_row(Bits* to, Acc of_dy, const Bits* x, Acc of_x, bool with_x, const void* next) const {
    if (with_x)
      put_mixed<S>(dy, of_dy, x, of_x, to, C, a.past_caches, next);
    else
      write_row<S>(to, dy, C, of_dy);
  }

  template <class F>
  MMFAST_MEMBER void each_row_of(int64_t task, const F& f) const {
    const int64_t from = task * a.chunk_rows;
    const int64_t to = min64(from + a.chunk_rows, a.shape.rows());
    Place at{from / a.shape.n1, from % a.shape.n1};
    take_weights();
    for (int64_t r = from; r < to; ++r) {
      const Place next = r + 1 < to ? at.after(a.shape) : at;
      f(at, next);
      at = next;
    }
    end_streaming(a.past_caches);
  }
};

template <class S>
int64_t adaptation_gate_scratch(const AdaptationGateArgs& a) {
  return AdaptationGateRows<S>(a, nullptr).arena.used;
}
template <class S>
void adaptation_gate_fwd(const AdaptationGateArgs& a, int64_t task, void* scratch) {
  const AdaptationGateRows<S> rows(a, scratch);
  rows.each_row_of(task, [&](Place at, Place next) { rows.forward_row(at, next); });
}
template <class S>
void adaptation_gate_bwd(const AdaptationGateArgs& a, int64_t task, void* scratch) {
  AdaptationGateRows<S> rows(a, scratch);
  const auto start = [&](void* all) {
    return start_sums<typename S::Acc>(all, task, a.sum_stride, a.shape.columns);
  };
  rows.columns = {start(a.sum_d_n), start(a.sum_d)};
  rows.each_row_of(task, [&](Place at, Place next) { rows.backward_row(at, next); });
}

template <class S>
void adaptation_gate_bwd_columns(const AdaptationGateArgs& a, int64_t task) {
  using Acc = typename S::Acc;
  const int64_t from = task * mmfast::kAdaptationGateColumns;
  const int64_t count = min64(mmfast::kAdaptationGateColumns, a.shape.columns - from);
  const auto put = [&](const mmfast::RowOperand& to, const void* sums) {
    if (to.data == nullptr) return;
    WithStore<Acc>::call(to.dtype, [&](auto tag) MMFAST_LAMBDA {
      using To = decltype(tag);
      sum_slots(static_cast<const Acc*>(sums) + from, a.chunks, a.sum_stride, count,
                [&](auto at, int64_t c, Vec<Acc> sum) MMFAST_LAMBDA {
                  at.template store<To>(static_cast<typename To::Bits*>(to.data) + from + c, sum);
                });
    });
  };
  put(a.dweight, a.sum_d_n);
  put(a.dbias, a.sum_d);
}

template <class S>
constexpr mmfast::AdaptationGateKernels adaptation_gate_kernels() {
  return {adaptation_gate_scratch<S>, adaptation_gate_fwd<S>, adaptation_gate_scratch<S>,
          adaptation_gate_bwd<S>, adaptation_gate_bwd_columns<S>};
}
constexpr mmfast::AdaptationGateTable adaptation_gate_table() {
  return {adaptation_gate_kernels<StoreF32>(), adaptation_gate_kernels<StoreBF16>(),
          adaptation_gate_kernels<StoreF16>(), adaptation_gate_kernels<StoreF64>()};
}

}  // namespace
