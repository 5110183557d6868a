// What both passes of fuse share: the rows of a task, the modalities that each has, and the steps
// in which a row is taken.
#pragma once
#include "fuse.h"
#include "spans.h"

namespace {

constexpr int kMost = int(mmfast::kFuseMost);

// Members that a row calls once: inlined everywhere they made up most of the code.
#define MMFAST_ONCE __attribute__((noinline))

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f with the mode as a constant.
template <class F>
MMFAST_INLINE void with_mode(int mode, const F& f) {
  switch (mode) {
    case mmfast::kFuseSoftmax:
      return f(Constant<mmfast::kFuseSoftmax>{});
    case mmfast::kFuseSigmoid:
      return f(Constant<mmfast::kFuseSigmoid>{});
    case mmfast::kFuseGmu:
      return f(Constant<mmfast::kFuseGmu>{});
    default:
      return f(Constant<mmfast::kFusePair>{});
  }
}
constexpr bool squashes(int mode) { return mode == mmfast::kFuseGmu || mode == mmfast::kFusePair; }

// Calls f with the count of modalities as a constant where that pays, otherwise 0.
template <class S, class F>
MMFAST_INLINE void with_count(int count, const F& f) {
  if constexpr (sizeof(typename S::Acc) == 4) {
    if (count == 2) return f(Constant<2>{});
    if (count == 3) return f(Constant<3>{});
  }
  f(Constant<0>{});
}

// Calls f with the storage of the logits: that of the features or the compute type.
template <class S, class F>
MMFAST_INLINE void with_logits(const mmfast::FuseArgs& a, const F& f) {
  if constexpr (sizeof(typename S::Bits) == 2)
    if (a.logits.dtype != mmfast::DType::F32) return f(S{});
  f(Plain<typename S::Acc>{});
}

template <class S>
MMFAST_INLINE bool aligned(const typename S::Bits* p) {
  return uintptr_t(p) % (lanes<typename S::Acc>() * sizeof(*p)) == 0;
}

// Calls f(at, Constant<n>, c) for n vectors from c on: U a step, then single ones, then what is
// left of one.
template <class S, int U, class F>
MMFAST_INLINE void each_step(int64_t count, bool streamed, const F& f) {
  constexpr int L = lanes<typename S::Acc>();
  int64_t c = 0;
  for (; c + U * L <= count; c += U * L) f(Whole{streamed}, Constant<U>{}, c);
  if constexpr (U > 1)
    for (; c + L <= count; c += L) f(Whole{streamed}, Constant<1>{}, c);
  if (c < count) f(Part{int(count - c)}, Constant<1>{}, c);
}

struct Span {
  int64_t from, to;
};
MMFAST_INLINE Span rows_of(const mmfast::FuseArgs& a, int64_t task) {
  const int64_t start = task / a.chunks * a.group_rows;
  const int64_t from = start + task % a.chunks * a.chunk;
  return {from, min64(from + a.chunk, start + a.group_rows)};
}
// Makes one long row of the span where that is allowed. Returns the columns of a row.
MMFAST_INLINE int64_t join_rows(const mmfast::FuseArgs& a, Span& rows) {
  if (!a.one_run) return a.C;
  const int64_t columns = (rows.to - rows.from) * a.C;
  rows.to = rows.from + 1;
  return columns;
}
// Calls f(b, n) for the rows of a span in their order.
template <class F>
MMFAST_INLINE void each_row_of(const mmfast::FuseArgs& a, Span rows, const F& f) {
  const int64_t inner = a.items_inner ? a.B : a.N;
  int64_t i = rows.from / inner, j = rows.from % inner;
  for (int64_t row = rows.from; row < rows.to; ++row) {
    f(a.items_inner ? j : i, a.items_inner ? i : j);
    if (++j == inner) j = 0, ++i;
  }
}

// The modalities that an item has.
struct Presence {
  const mmfast::FuseArgs& a;
  int64_t item = -1;
  int count = 0;
  int index[kMost];

  explicit Presence(const mmfast::FuseArgs& args) : a(args) {}

  bool has(int k) const { return a.present == nullptr || a.present[item * a.K + k] != 0; }

  // Goes to item b. Whether the list changed.
  MMFAST_ONCE bool take(int64_t b) {
    if (b == item) return false;
    const int64_t before = item;
    item = b;
    if (before >= 0) {
      if (a.present == nullptr) return false;
      const uint8_t *now = a.present + b * a.K, *then = a.present + before * a.K;
      int64_t k = 0;
      while (k < a.K && now[k] == then[k]) ++k;
      if (k == a.K) return false;
    }
    count = 0;
    for (int k = 0; k < a.K; ++k)
      if (has(k)) index[count++] = k;
    return true;
  }
};

// In mode kFusePair a modality keeps its place: pointers of the present ones -> of both, null where
// absent.
template <class P>
MMFAST_INLINE void spread_pair(const Presence& present, P** p) {
  if (present.count == 2) return;
  P* const one = p[0];
  p[0] = present.has(0) ? one : nullptr;
  p[1] = present.has(1) ? one : nullptr;
}

template <class LS, class P>
MMFAST_INLINE void point_logits(const mmfast::FuseArgs& a, const Presence& present, int64_t b,
                                int64_t n, P** l) {
  auto* row = row_at<typename LS::Bits>(a.logits, b, n);
  l[0] = row;
  if (a.gates == a.K)
    for (int j = 0; j < present.count; ++j) l[j] = row + present.index[j] * a.logits_k;
}

}  // namespace
