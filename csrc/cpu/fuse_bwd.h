// The backward pass of fuse: the incoming gradient and every feature are read once, tanh is made
// again. With d_k = dout * f(x_k), the gradient of weight k before any sum, the three ways to the
// weights are those of the forward.
#pragma once
#include "fuse_fwd.h"

namespace {

template <class S>
struct BwdRow {
  using Bits = typename S::Bits;
  int count;
  const Bits *x[kMost], *dout;
  Bits* dx[kMost];
  bool need_dx, streamed;

  // Gradients of what is absent are made 0 here.
  MMFAST_ONCE void point(const mmfast::FuseArgs& a, const Presence& p, int64_t b, int64_t n) {
    count = p.count;
    dout = row_at<const Bits>(a.dout, b, n);
    need_dx = a.dfeatures != nullptr;
    streamed = a.past_caches;
    for (int j = 0; j < count; ++j) {
      x[j] = row_at<const Bits>(a.features[p.index[j]], b, n);
      if (!need_dx) continue;
      dx[j] = row_at<Bits>(a.dfeatures[p.index[j]], b, n);
      streamed = streamed && aligned<S>(dx[j]);
    }
  }
  MMFAST_ONCE void clear_absent(const mmfast::FuseArgs& a, const Presence& p, int64_t b, int64_t n,
                                int64_t c0, int64_t columns) const {
    if (!need_dx || count == a.K) return;
    for (int k = 0; k < a.K; ++k)
      if (!p.has(k)) clear_row<S>(row_at<Bits>(a.dfeatures[k], b, n) + c0, columns);
  }
};

template <class S, bool TANH>
MMFAST_INLINE ValueSlope<typename S::Acc> term_and_slope(Vec<typename S::Acc> x) {
  if constexpr (TANH)
    return Math<S>::template tanh_both<typename S::Acc>(x);
  else
    return {x, splat(typename S::Acc(1))};
}

// Columns [c0, c0 + width): dx_k from weight(at, j, i), and take(at, j, i, u-th d_k).
template <class S, bool TANH, int KFIX, class W, class D>
MMFAST_INLINE void bwd_weighted(const BwdRow<S>& row, int64_t c0, int64_t width, const W& weight,
                                const D& take) {
  using V = Vec<typename S::Acc>;
  constexpr int L = lanes<typename S::Acc>();
  const int count = KFIX ? KFIX : row.count;
  each_step<S, TANH ? 1 : 2>(
      width, row.streamed, [&](auto at, auto vectors, int64_t i) MMFAST_LAMBDA {
        constexpr int U = decltype(vectors)::value;
        V g[U];
        MMFAST_UNROLL
        for (int u = 0; u < U; ++u) g[u] = at.template load<S>(row.dout + c0 + i + u * L);
        for (int j = 0; j < count; ++j) {
          MMFAST_UNROLL
          for (int u = 0; u < U; ++u) {
            const int64_t c = i + u * L;
            const auto t = term_and_slope<S, TANH>(at.template load<S>(row.x[j] + c0 + c));
            take(at, j, c, g[u] * t.value);
            if (row.need_dx)
              at.template store<S>(row.dx[j] + c0 + c, weight(at, j, c) * g[u] * t.slope);
          }
        }
      });
}

// One weight for a row and modality. d[j] becomes the sum of d_k over the columns: in the compute
// type over a piece of the row, then in double.
template <class S, bool TANH>
MMFAST_NOINLINE void bwd_scalar(const BwdRow<S>& row, int64_t C, const typename S::Acc* w,
                                double* d) {
  using T = typename S::Acc;
  constexpr int64_t kPiece = 2048;
  with_count<S>(row.count, [&](auto fixed) MMFAST_LAMBDA {
    constexpr int KFIX = decltype(fixed)::value;
    for (int j = 0; j < row.count; ++j) d[j] = 0;
    Vec<T> sum[KFIX ? KFIX : kMost];
    for (int64_t c0 = 0; c0 < C; c0 += kPiece) {
      for (int j = 0; j < (KFIX ? KFIX : row.count); ++j) sum[j] = Vec<T>{};
      bwd_weighted<S, TANH, KFIX>(
          row, c0, min64(kPiece, C - c0),
          [&](auto, int j, int64_t) MMFAST_LAMBDA { return splat(w[j]); },
          [&](auto, int j, int64_t, Vec<T> v) MMFAST_LAMBDA { sum[j] += v; });
      for (int j = 0; j < (KFIX ? KFIX : row.count); ++j) d[j] += double(lane_sum(sum[j]));
    }
  });
}

template <class S, bool TANH>
MMFAST_INLINE void bwd_scalar_task(const mmfast::FuseArgs& a, Span rows, typename S::Acc* parts) {
  using T = typename S::Acc;
  const bool own = a.sharing == mmfast::FuseSharing::NOTHING;
  Batch<T> batch;
  Presence present(a);
  BwdRow<S> row;
  T w[kMost];
  const int64_t columns = join_rows(a, rows);
  double d[kMost], sums[kMost];
  for (int64_t k = 0; k < a.gates; ++k) sums[k] = 0;
  each_batch<T>(a, rows, batch, [&]() MMFAST_LAMBDA {
    for (int64_t k = 0; k < a.K; ++k) store(batch.d + k * batch.L, Vec<T>{});
    for (int i = 0; i < batch.rows; ++i) {
      present.take(batch.b[i]);
      row.point(a, present, batch.b[i], batch.n[i]);
      row.clear_absent(a, present, batch.b[i], batch.n[i], 0, columns);
      if (row.count == 0) continue;
      for (int j = 0; j < row.count; ++j) w[j] = batch.w[present.index[j] * batch.L + i];
      bwd_scalar<S, TANH>(row, columns, w, d);
      for (int j = 0; j < row.count; ++j) batch.d[present.index[j] * batch.L + i] = T(d[j]);
    }
    if (!a.need_dlogits) return;
    batch.turn(a);
    for (int i = 0; i < batch.rows; ++i)
      for (int64_t k = 0; k < a.gates; ++k) {
        const T dl = batch.has(a, i, k) ? batch.d[k * batch.L + i] : T(0);
        if (own)
          write_one<T>(a.logits.dtype, a.dlogits, (batch.b[i] * a.N + batch.n[i]) * a.gates + k,
                       dl);
        else
          sums[k] += double(dl);
      }
  });
  if (a.need_dlogits && !own)
    for (int64_t k = 0; k < a.gates; ++k) parts[k] = T(sums[k]);
}

// Logits, and their gradient, per row and channel.
template <class S, class LS, int MODE, int KFIX>
MMFAST_INLINE void bwd_own(const BwdRow<S>& row, int64_t C, const typename LS::Bits* const* l,
                           typename LS::Bits* const* dl) {
  using T = typename S::Acc;
  using V = Vec<T>;
  constexpr bool kPair = MODE == mmfast::kFusePair;
  constexpr int kWeights = kPair ? 2 : KFIX ? KFIX : kMost;
  const int count = KFIX ? KFIX : row.count, gates = kPair ? 1 : count;
  each_step<S, 1>(C, row.streamed, [&](auto at, auto, int64_t c) MMFAST_LAMBDA {
    V w[kWeights], d[kWeights];
    for (int j = 0; j < gates; ++j) w[j] = at.template load<LS>(l[j] + c);
    const V most = weigh<Math<LS>, MODE, KFIX, T>(count, w);
    const V g = at.template load<S>(row.dout + c);
    for (int j = 0; j < count; ++j) {
      d[j] = V{};
      if (kPair && row.x[j] == nullptr) continue;
      const auto t = term_and_slope<S, squashes(MODE)>(at.template load<S>(row.x[j] + c));
      d[j] = g * t.value;
      if (row.need_dx) at.template store<S>(row.dx[j] + c, w[j] * g * t.slope);
    }
    if (dl == nullptr) return;
    slope<MODE, KFIX, T>(count, w, d, most);
    for (int j = 0; j < gates; ++j) at.template store<LS>(dl[j] + c, d[j]);
  });
}
template <class S, class LS, int MODE>
MMFAST_NOINLINE void bwd_own(const BwdRow<S>& row, int64_t C, const typename LS::Bits* const* l,
                             typename LS::Bits* const* dl) {
  if constexpr (MODE == mmfast::kFusePair)
    bwd_own<S, LS, MODE, 2>(row, C, l, dl);
  else if constexpr (MODE != mmfast::kFuseSoftmax)
    bwd_own<S, LS, MODE, 0>(row, C, l, dl);
  else
    with_count<S>(row.count, [&](auto fixed) MMFAST_LAMBDA {
      bwd_own<S, LS, MODE, decltype(fixed)::value>(row, C, l, dl);
    });
}

template <class S, class LS, int MODE>
MMFAST_INLINE void bwd_own_task(const mmfast::FuseArgs& a, Span rows) {
  using Bits = typename LS::Bits;
  Presence present(a);
  BwdRow<S> row;
  const Bits* l[kMost];
  Bits* dl[kMost];
  each_row_of(a, rows, [&](int64_t b, int64_t n) MMFAST_LAMBDA {
    present.take(b);
    row.point(a, present, b, n);
    row.clear_absent(a, present, b, n, 0, a.C);
    point_logits<LS>(a, present, b, n, l);
    if (a.need_dlogits) {
      Bits* first = static_cast<Bits*>(a.dlogits) + (b * a.N + n) * a.gates * a.C;
      if (row.count < a.K && (a.gates == a.K || row.count == 0))
        for (int64_t k = 0; k < a.gates; ++k)
          if (a.gates < a.K || !present.has(int(k))) clear_row<LS>(first + k * a.C, a.C);
      dl[0] = first;
      for (int j = 0; j < row.count; ++j) {
        if (a.gates == a.K) dl[j] = first + present.index[j] * a.C;
        row.streamed = row.streamed && aligned<LS>(dl[a.gates == a.K ? j : 0]);
      }
    }
    if (row.count == 0) return;
    if constexpr (MODE == mmfast::kFusePair) {
      spread_pair(present, row.x);
      spread_pair(present, row.dx);
    }
    bwd_own<S, LS, MODE>(row, a.C, l, a.need_dlogits ? dl : nullptr);
  });
}

// Weights from a table, beside which the gradients of the weights are summed.
template <class S, bool TANH>
MMFAST_NOINLINE void bwd_shared(const BwdRow<S>& row, int64_t c0, int64_t width,
                                const Table<typename S::Acc>& table, const Presence& present) {
  using T = typename S::Acc;
  const T* w[kMost];
  T* d[kMost];
  for (int j = 0; j < row.count; ++j) {
    w[j] = table.w + present.index[j] * table.width;
    d[j] = table.d + present.index[j] * table.width;
  }
  with_count<S>(row.count, [&](auto fixed) MMFAST_LAMBDA {
    bwd_weighted<S, TANH, decltype(fixed)::value>(
        row, c0, width,
        [&](auto at, int j, int64_t i)
            MMFAST_LAMBDA { return at.template load<Plain<T>>(w[j] + i); },
        [&](auto at, int j, int64_t i, Vec<T> v)
            MMFAST_LAMBDA { keep(at, d[j] + i, at.template load<Plain<T>>(d[j] + i) + v); });
  });
}

template <class S, bool TANH>
MMFAST_INLINE void bwd_table_task(const mmfast::FuseArgs& a, Span rows, typename S::Acc* parts,
                                  typename S::Acc* scratch) {
  using T = typename S::Acc;
  Table<T> table(a, scratch);
  for (int64_t c0 = 0; c0 < a.C; c0 += table.width) {
    const int64_t width = min64(table.width, a.C - c0);
    Presence present(a), now(a);
    BwdRow<S> row;
    if (a.need_dlogits) {
      for (int64_t k = 0; k < a.gates; ++k)
        memset(parts + k * a.C + c0, 0, size_t(width) * sizeof(T));
      table.clear_gradient(a);
    }
    each_row_of(a, rows, [&](int64_t b, int64_t n) MMFAST_LAMBDA {
      if (now.take(b)) {
        if (a.need_dlogits && present.item >= 0) {
          table.turn(a, present, parts + c0, a.C, width);
          table.clear_gradient(a);
        }
        present.take(b);
        table.make(a, present, b, n, c0, width);
      }
      present.take(b);
      row.point(a, present, b, n);
      row.clear_absent(a, present, b, n, c0, width);
      if (row.count == 0) return;
      bwd_shared<S, TANH>(row, c0, width, table, present);
    });
    if (a.need_dlogits) table.turn(a, present, parts + c0, a.C, width);
  }
}

template <class S>
void fuse_bwd(const mmfast::FuseArgs& a, int64_t task, void* scratch) {
  using T = typename S::Acc;
  const Span rows = rows_of(a, task);
  T* parts = static_cast<T*>(a.dlogits_parts) + task * a.gates * (a.per_channel ? a.C : 1);
  if (!a.per_channel) {
    if (squashes(a.mode))
      bwd_scalar_task<S, true>(a, rows, parts);
    else
      bwd_scalar_task<S, false>(a, rows, parts);
  } else if (a.sharing != mmfast::FuseSharing::NOTHING) {
    if (squashes(a.mode))
      bwd_table_task<S, true>(a, rows, parts, static_cast<T*>(scratch));
    else
      bwd_table_task<S, false>(a, rows, parts, static_cast<T*>(scratch));
  } else {
    with_logits<S>(a, [&](auto logits) {
      with_mode(a.mode, [&](auto mode) {
        bwd_own_task<S, decltype(logits), decltype(mode)::value>(a, rows);
      });
    });
  }
  end_streaming(a.past_caches);
}

}  // namespace
