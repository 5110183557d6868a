// The gradient of a gate that broadcasts, act'(gate) * (sum of dout * y over what it broadcasts
// over), in the pass that makes dy. A task sums the rows of a chunk in their order; chunks follow
// from the shape, and bwd_finish adds them up in their order: any number of threads, the same bits.
#pragma once
#include "gated_residual_rows.h"

namespace {

// The rows and columns of one task; f(group, from, to) for each of its groups.
struct SumTask {
  int64_t slot, c, count;
  template <class F>
  static MMFAST_MEMBER void each_group(const GatedResidualArgs& x, int64_t task, const F& f) {
    const int64_t column = task % x.column_tasks, chunk = task / x.column_tasks % x.chunks;
    const int64_t c = column * x.columns_each;
    const SumTask t = {x.gate.sc != 0 ? chunk : chunk * x.column_tasks + column, c,
                       min64(x.columns_each, x.shape.columns - c)};
    const int64_t first = task / x.column_tasks / x.chunks * x.groups_each;
    for (int64_t g = first; g < min64(first + x.groups_each, x.groups); ++g) {
      const int64_t from = g * x.reduced + chunk * x.rows_each;
      f(t, g, from, min64(from + x.rows_each, (g + 1) * x.reduced));
    }
  }
};

template <class S>
MMFAST_INLINE bool rows_align(typename S::Bits* const* rows, int count) {
  for (int k = 1; k < count; ++k)
    if (!same_alignment(rows[0], rows[k])) return false;
  return true;
}

// Rows taken together, so that the sums are read and written once for all of them.
constexpr int kRowsTogether = 4;

template <class S>
struct RowPointers {
  const typename S::Bits *dout[kRowsTogether], *y[kRowsTogether];
  typename S::Bits* dy[kRowsTogether];
};

// sums[c] += dout * y of ROWS rows; dy = gate * dout
template <class S, int ROWS>
MMFAST_INLINE void add_rows(const RowPointers<S>& p, const typename S::Acc* gate,
                            typename S::Acc* sums, int64_t count, bool need_dy, bool streamed) {
  using T = typename S::Acc;
  const bool past = streamed && need_dy && rows_align<S>(p.dy, ROWS);
  each_element<S>(count, past ? p.dy[0] : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
    const Vec<T> g = at.template load<Plain<T>>(gate + i);
    Vec<T> sum = at.template load<Plain<T>>(sums + i);
    MMFAST_UNROLL
    for (int k = 0; k < ROWS; ++k) {
      const Vec<T> d = at.template load<S>(p.dout[k] + i);
      sum += d * at.template load<S>(p.y[k] + i);
      if (need_dy) at.template store<S>(p.dy[k] + i, g * d);
    }
    keep(at, sums + i, sum);
  });
}

// dgate[c] = act'(gate[c]) * sum of column c, for `count` columns from c on of the row of a group.
template <class S, class A, class F>
MMFAST_INLINE void write_gate_gradient(const GatedResidualArgs& x, int64_t group, int64_t c,
                                       int64_t count, const F& each_sum) {
  using T = typename S::Acc;
  const int64_t row = group * x.reduced, i0 = row / x.shape.n1, i1 = row % x.shape.n1;
  with_gate_storage<S>(x, [&](auto tag) MMFAST_LAMBDA {
    using G = decltype(tag);
    const auto* gate = row_at<const typename G::Bits>(x.gate, i0, i1, c);
    auto* dgate = row_at<typename G::Bits>(x.dgate, i0, i1, c);
    each_sum(count, [&](auto at, int64_t i, Vec<T> sum) MMFAST_LAMBDA {
      const Vec<T> slope = A::template both<T>(at.template load<G>(gate + i)).slope;
      at.template store<G>(dgate + i, sum * slope);
    });
  });
}

template <class T>
MMFAST_INLINE T* slot_of(const GatedResidualArgs& x, int64_t group, int64_t slot, int64_t c) {
  return static_cast<T*>(x.parts) + (group * x.slots + slot) * x.width() + c;
}

// The sums of a task: kept for bwd_finish, or the gradient at once where there is one slot.
template <class S, class A>
MMFAST_INLINE void end_sums(const GatedResidualArgs& x, int64_t group, int64_t slot, int64_t c,
                            int64_t count, const typename S::Acc* sums) {
  using T = typename S::Acc;
  if (x.slots > 1) {
    memcpy(slot_of<T>(x, group, slot, c), sums, size_t(count) * sizeof(T));
    return;
  }
  write_gate_gradient<S, A>(x, group, c, count, [&](int64_t n, const auto& f) MMFAST_LAMBDA {
    each_vector<Plain<T>>(n, [&](auto at, int64_t i)
                                 MMFAST_LAMBDA { f(at, i, at.template load<Plain<T>>(sums + i)); });
  });
}

// A gate with columns: sums down the columns of the rows of a chunk.
template <class S, class A>
void gated_column_sums(const GatedResidualArgs& x, int64_t task, void* scratch) {
  using T = typename S::Acc;
  using Bits = typename S::Bits;
  T* sums = static_cast<T*>(scratch) + round_up(x.columns_each, 64);
  GateRows<S, A> gates(x, scratch);
  const bool need_dy = x.dy.data != nullptr;
  SumTask::each_group(x, task, [&](const SumTask& t, int64_t group, int64_t from, int64_t to) {
    memset(sums, 0, size_t(t.count) * sizeof(T));
    RowPointers<S> p;
    int waiting = 0;
    const T* gate = nullptr;
    for (int64_t row = from; row < to; ++row) {
      const int64_t i0 = row / x.shape.n1, i1 = row % x.shape.n1;
      Bits* dy = need_dy ? row_at<Bits>(x.dy, i0, i1, t.c) : nullptr;
      if (!row_is_on(x, i0, i1)) {
        if (need_dy) masked_row<S, false>(x, nullptr, dy, t.count);
        continue;
      }
      gate = gates.many(i0, i1, t.c, t.count);
      p.dout[waiting] = row_at<const Bits>(x.dout, i0, i1, t.c);
      p.y[waiting] = row_at<const Bits>(x.y, i0, i1, t.c);
      p.dy[waiting] = dy;
      if (++waiting < kRowsTogether) continue;
      add_rows<S, kRowsTogether>(p, gate, sums, t.count, need_dy, x.streamed);
      waiting = 0;
    }
    for (int k = 0; k < waiting; ++k) {
      const RowPointers<S> one = {{p.dout[k]}, {p.y[k]}, {p.dy[k]}};
      add_rows<S, 1>(one, gate, sums, t.count, need_dy, x.streamed);
    }
    end_sums<S, A>(x, group, t.slot, t.c, t.count, sums);
  });
  end_streaming(x.streamed);
}

// A gate without columns: one sum over the rows of a chunk.
template <class S, class A>
void gated_dots(const GatedResidualArgs& x, int64_t task) {
  using T = typename S::Acc;
  using Bits = typename S::Bits;
  constexpr int64_t kBlock = 2048;
  GateRows<S, A> gates(x, nullptr);
  const bool need_dy = x.dy.data != nullptr;
  SumTask::each_group(x, task, [&](const SumTask& t, int64_t group, int64_t from, int64_t to) {
    Vec<T> sum = {};
    for (int64_t row = from; row < to; ++row) {
      const int64_t i0 = row / x.shape.n1, i1 = row % x.shape.n1;
      if (!row_is_on(x, i0, i1)) {
        if (need_dy) masked_row<S, false>(x, nullptr, row_at<Bits>(x.dy, i0, i1, t.c), t.count);
        continue;
      }
      const Vec<T> g = gates.one(i0, i1);
      // Block by block: short sums lose less.
      for (int64_t c = t.c; c < t.c + t.count; c += kBlock) {
        const int64_t count = min64(kBlock, t.c + t.count - c);
        const Bits* dout = row_at<const Bits>(x.dout, i0, i1, c);
        const Bits* y = row_at<const Bits>(x.y, i0, i1, c);
        Bits* dy = need_dy ? row_at<Bits>(x.dy, i0, i1, c) : nullptr;
        Vec<T> part = {};
        each_element<S>(count, x.streamed ? dy : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
          const Vec<T> d = at.template load<S>(dout + i);
          part += d * at.template load<S>(y + i);
          if (need_dy) at.template store<S>(dy + i, g * d);
        });
        sum += part;
      }
    }
    const T total = lane_sum(sum);
    end_sums<S, A>(x, group, t.slot, 0, 1, &total);
  });
  end_streaming(x.streamed);
}

template <class S, class A>
void gated_finish(const GatedResidualArgs& x, int64_t task) {
  using T = typename S::Acc;
  const int64_t blocks = ceil_div(x.width(), mmfast::kFinishColumns);
  const int64_t group = task / blocks, c = task % blocks * mmfast::kFinishColumns;
  const int64_t count = min64(mmfast::kFinishColumns, x.width() - c);
  write_gate_gradient<S, A>(x, group, c, count, [&](int64_t n, const auto& f) MMFAST_LAMBDA {
    sum_slots<T>(slot_of<T>(x, group, 0, c), x.slots, x.width(), n, f);
  });
}

}  // namespace
