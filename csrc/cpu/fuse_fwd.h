// The forward pass of fuse: every feature is read once, the result written once. There are three
// ways to the weights: one for a row and modality (Batch), a table of them per channel that many
// rows share (Table), and logits per row and channel, weighed as they are read.
#pragma once
#include "fuse_weights.h"

namespace {

template <class S>
struct FwdRow {
  using Bits = typename S::Bits;
  int count;
  const Bits* x[kMost];  // null in mode kFusePair: absent
  Bits* out;
  bool streamed;

  MMFAST_ONCE void point(const mmfast::FuseArgs& a, const Presence& p, int64_t b, int64_t n) {
    count = p.count;
    for (int j = 0; j < count; ++j) x[j] = row_at<const Bits>(a.features[p.index[j]], b, n);
    out = row_at<Bits>(a.out, b, n);
    streamed = a.past_caches && aligned<S>(out);
  }
};

template <class S, bool TANH>
MMFAST_INLINE Vec<typename S::Acc> term(Vec<typename S::Acc> x) {
  if constexpr (TANH)
    return Math<S>::template tanh<typename S::Acc>(x);
  else
    return x;
}

// `width` columns from c0 with weight(at, j, c - c0).
template <class S, bool TANH, int KFIX, class W>
MMFAST_INLINE void fwd_weighted(const FwdRow<S>& row, int64_t c0, int64_t width, const W& weight) {
  using V = Vec<typename S::Acc>;
  constexpr int L = lanes<typename S::Acc>();
  const int count = KFIX ? KFIX : row.count;
  each_step<S, TANH ? 2 : 4>(
      width, row.streamed, [&](auto at, auto vectors, int64_t i) MMFAST_LAMBDA {
        constexpr int U = decltype(vectors)::value;
        V sum[U] = {};
        for (int j = 0; j < count; ++j) {
          MMFAST_UNROLL
          for (int u = 0; u < U; ++u)
            sum[u] += weight(at, j, i + u * L) *
                      term<S, TANH>(at.template load<S>(row.x[j] + c0 + i + u * L));
        }
        MMFAST_UNROLL
        for (int u = 0; u < U; ++u) at.template store<S>(row.out + c0 + i + u * L, sum[u]);
      });
}

// One weight for a row and modality: w[j].
template <class S, bool TANH>
MMFAST_NOINLINE void fwd_scalar(const FwdRow<S>& row, int64_t C, const typename S::Acc* w) {
  with_count<S>(row.count, [&](auto fixed) MMFAST_LAMBDA {
    constexpr int KFIX = decltype(fixed)::value;
    Vec<typename S::Acc> kept[KFIX ? KFIX : 1];
    for (int j = 0; j < KFIX; ++j) kept[j] = splat(w[j]);
    fwd_weighted<S, TANH, KFIX>(row, 0, C, [&](auto, int j, int64_t) MMFAST_LAMBDA {
      if constexpr (KFIX > 0)
        return kept[j];
      else
        return splat(w[j]);
    });
  });
}

// Weights from the logits of this row, l[j] + c.
template <class S, class LS, int MODE, int KFIX>
MMFAST_INLINE void fwd_own(const FwdRow<S>& row, int64_t C, const typename LS::Bits* const* l) {
  using T = typename S::Acc;
  using V = Vec<T>;
  constexpr int L = lanes<T>(), kWeights = MODE == mmfast::kFusePair ? 2 : KFIX ? KFIX : kMost;
  const int count = MODE == mmfast::kFusePair ? 2 : KFIX ? KFIX : row.count;
  const int gates = MODE == mmfast::kFusePair ? 1 : count;
  each_step<S, KFIX ? 2 : 1>(C, row.streamed, [&](auto at, auto vectors, int64_t c) MMFAST_LAMBDA {
    constexpr int U = decltype(vectors)::value;
    MMFAST_UNROLL
    for (int u = 0; u < U; ++u) {
      V w[kWeights];
      for (int j = 0; j < gates; ++j) w[j] = at.template load<LS>(l[j] + c + u * L);
      weigh<Math<LS>, MODE, KFIX, T>(count, w);
      V sum = {};
      for (int j = 0; j < count; ++j) {
        if (MODE == mmfast::kFusePair && row.x[j] == nullptr) continue;
        const V x = at.template load<S>(row.x[j] + c + u * L);
        sum += w[j] * term<S, squashes(MODE)>(x);
      }
      at.template store<S>(row.out + c + u * L, sum);
    }
  });
}
template <class S, class LS, int MODE>
MMFAST_NOINLINE void fwd_own(const FwdRow<S>& row, int64_t C, const typename LS::Bits* const* l) {
  if constexpr (MODE == mmfast::kFusePair)
    fwd_own<S, LS, MODE, 2>(row, C, l);
  else if constexpr (MODE != mmfast::kFuseSoftmax)
    fwd_own<S, LS, MODE, 0>(row, C, l);
  else
    with_count<S>(row.count, [&](auto fixed) MMFAST_LAMBDA {
      fwd_own<S, LS, MODE, decltype(fixed)::value>(row, C, l);
    });
}

template <class S>
MMFAST_INLINE void clear_row(typename S::Bits* row, int64_t C) {
  memset(row, 0, size_t(C) * sizeof(*row));
}

template <class S, bool TANH>
MMFAST_INLINE void fwd_scalar_task(const mmfast::FuseArgs& a, Span rows) {
  using T = typename S::Acc;
  Batch<T> batch;
  Presence present(a);
  FwdRow<S> row;
  T w[kMost];
  const int64_t columns = join_rows(a, rows);
  each_batch<T>(a, rows, batch, [&]() MMFAST_LAMBDA {
    for (int i = 0; i < batch.rows; ++i) {
      present.take(batch.b[i]);
      row.point(a, present, batch.b[i], batch.n[i]);
      for (int j = 0; j < row.count; ++j) w[j] = batch.w[present.index[j] * batch.L + i];
      if (row.count == 0)
        clear_row<S>(row.out, columns);
      else
        fwd_scalar<S, TANH>(row, columns, w);
    }
  });
}

template <class S, class LS, int MODE>
MMFAST_INLINE void fwd_own_task(const mmfast::FuseArgs& a, Span rows) {
  Presence present(a);
  FwdRow<S> row;
  const typename LS::Bits* l[kMost];
  each_row_of(a, rows, [&](int64_t b, int64_t n) MMFAST_LAMBDA {
    present.take(b);
    row.point(a, present, b, n);
    point_logits<LS>(a, present, b, n, l);
    if (row.count == 0) return clear_row<S>(row.out, a.C);
    if constexpr (MODE == mmfast::kFusePair) spread_pair(present, row.x);
    fwd_own<S, LS, MODE>(row, a.C, l);
  });
}

// Weights from a table.
template <class S, bool TANH>
MMFAST_NOINLINE void fwd_shared(const FwdRow<S>& row, int64_t c0, int64_t width,
                                const Table<typename S::Acc>& table, const Presence& present) {
  using T = typename S::Acc;
  const T* w[kMost];
  for (int j = 0; j < row.count; ++j) w[j] = table.w + present.index[j] * table.width;
  with_count<S>(row.count, [&](auto fixed) MMFAST_LAMBDA {
    fwd_weighted<S, TANH, decltype(fixed)::value>(row, c0, width,
                                                  [&](auto at, int j, int64_t i) MMFAST_LAMBDA {
                                                    return at.template load<Plain<T>>(w[j] + i);
                                                  });
  });
}

template <class S, bool TANH>
MMFAST_INLINE void fwd_table_task(const mmfast::FuseArgs& a, Span rows, typename S::Acc* scratch) {
  using T = typename S::Acc;
  Table<T> table(a, scratch);
  for (int64_t c0 = 0; c0 < a.C; c0 += table.width) {
    Presence present(a);
    FwdRow<S> row;
    const int64_t width = min64(table.width, a.C - c0);
    each_row_of(a, rows, [&](int64_t b, int64_t n) MMFAST_LAMBDA {
      if (present.take(b)) table.make(a, present, b, n, c0, width);
      row.point(a, present, b, n);
      if (row.count == 0) return clear_row<S>(row.out + c0, width);
      fwd_shared<S, TANH>(row, c0, width, table, present);
    });
  }
}

template <class S>
void fuse_fwd(const mmfast::FuseArgs& a, int64_t task, void* scratch) {
  const Span rows = rows_of(a, task);
  auto* memory = static_cast<typename S::Acc*>(scratch);
  if (!a.per_channel) {
    if (squashes(a.mode))
      fwd_scalar_task<S, true>(a, rows);
    else
      fwd_scalar_task<S, false>(a, rows);
  } else if (a.sharing != mmfast::FuseSharing::NOTHING) {
    if (squashes(a.mode))
      fwd_table_task<S, true>(a, rows, memory);
    else
      fwd_table_task<S, false>(a, rows, memory);
  } else {
    with_logits<S>(a, [&](auto logits) {
      with_mode(a.mode, [&](auto mode) {
        fwd_own_task<S, decltype(logits), decltype(mode)::value>(a, rows);
      });
    });
  }
  end_streaming(a.past_caches);
}

}  // namespace
