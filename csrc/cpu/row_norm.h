// The norm of a row that is in cache, forward and backward: the pieces that modulate and
// adaptation_gate share. Rows are read where they lie or from scratch in the compute type.
#pragma once
#include "spans.h"

namespace {

// Rows of this storage are read where they lie: they are in the compute type already.
template <class S>
constexpr bool kIsPlain = sizeof(typename S::Bits) == sizeof(typename S::Acc);

// A row of the shape; rows are numbered in order.
struct Place {
  int64_t i0, i1;
  MMFAST_MEMBER Place after(const mmfast::RowShape& shape) const {
    return i1 + 1 < shape.n1 ? Place{i0, i1 + 1} : Place{i0 + 1, 0};
  }
};
template <class T>
MMFAST_INLINE T* row_at(const mmfast::RowOperand& x, Place at) {
  return row_at<T>(x, at.i0, at.i1);
}
MMFAST_INLINE void* any_row_at(const mmfast::RowOperand& x, Place at) {
  return byte_offset(x.data, x.dtype, at.i0 * x.s0 + at.i1 * x.s1);
}

template <class Acc>
MMFAST_INLINE void fill_row(Acc* row, int64_t count, Acc value) {
  for (int64_t i = 0; i < count; ++i) row[i] = value;
}
template <class Acc>
MMFAST_INLINE void copy_row(const mmfast::RowOperand& x, Place at, Acc* to, int64_t count) {
  read_row<Acc>(x.dtype, any_row_at(x, at), to, count, count);
}

// Hands out rows of scratch; with a null base it only counts.
template <class Acc>
struct RowArena {
  char* base;
  int64_t stride;
  int64_t used = 0;
  RowArena(void* scratch, int64_t count)
      : base(static_cast<char*>(scratch)),
        // An odd number of lines apart: equal places of different rows share no cache set.
        stride((round_up(count * int64_t(sizeof(Acc)), 64) / 64 | 1) * 64) {}
  Acc* take() {
    char* p = base == nullptr ? nullptr : base + used;
    used += stride;
    return reinterpret_cast<Acc*>(p);
  }
};

MMFAST_INLINE void ahead(const void* p, int64_t bytes) {
  __builtin_prefetch(static_cast<const char*>(p) + bytes);
}

template <class V>
MMFAST_INLINE V only_lanes(Whole, V v) {
  return v;
}
MMFAST_INLINE VFloat only_lanes(Part at, VFloat v) {
  return lane_index<float>() < at.n ? v : VFloat{};
}
MMFAST_INLINE VDouble only_lanes(Part at, VDouble v) {
  return lane_index<double>() < at.n ? v : VDouble{};
}

// Storage of what is rounded to it already: `settle` gives v as it will be read back.
template <class S>
struct Rounded : S {
  using Acc = typename S::Acc;
  MMFAST_INLINE Vec<Acc> settle(Vec<Acc> v) {
    if constexpr (kIsPlain<S>) return v;
    typename S::Bits bits[lanes<Acc>()];
    S::storev(bits, v);
    return S::loadv(bits);
  }
};
#if !defined(__AVX512BF16__)
template <>
struct Rounded<StoreBF16> : StoreBF16 {
  MMFAST_INLINE VFloat settle(VFloat v) { return (VFloat)(bf16_bits(v) << 16); }
  MMFAST_INLINE void storev(uint16_t* p, VFloat v) {
    const VHalfBits h = __builtin_convertvector((VUint)v >> 16, VHalfBits);
    memcpy(p, &h, sizeof h);
  }
};
#endif

// v, and no fused multiply-add that would see more digits of it than others do.
template <class V>
MMFAST_INLINE V settled(V v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// Elements that go into one sum of the compute type before it joins the row's sum in double.
constexpr int64_t kSumBlock = 4096;

// sums[k] += the sum over the row of what f(at, i, acc) adds to acc[k]. Four sets of sums hide the
// latency of the additions.
template <class Acc, int K, class F>
MMFAST_INLINE void sum_over_row(int64_t count, double (&sums)[K], const F& f) {
  constexpr int L = lanes<Acc>();
  for (int64_t from = 0; from < count; from += kSumBlock) {
    const int64_t to = min64(from + kSumBlock, count);
    Vec<Acc> acc[4][K] = {};
    int64_t i = from;
    for (; i + 4 * L <= to; i += 4 * L)
      MMFAST_UNROLL for (int j = 0; j < 4; ++j) f(Whole{false}, i + j * L, acc[j]);
    for (; i + L <= to; i += L) f(Whole{false}, i, acc[0]);
    if (i < to) f(Part{int(to - i)}, i, acc[1]);
    for (int k = 0; k < K; ++k)
      sums[k] += double(lane_sum((acc[0][k] + acc[1][k]) + (acc[2][k] + acc[3][k])));
  }
}

// Moments are passed by value: through a reference a store to a row might change them.
// The normalised row is (v - centre) * rstd + offset. The centre is the mean as first summed; what
// is left of the mean after subtracting it is in the offset, so that a large mean costs nothing.
template <class Acc>
struct Moments {
  Acc centre = 0, rstd = 1, offset = 0;
  MMFAST_MEMBER Vec<Acc> normal(Vec<Acc> v) const { return (v - centre) * rstd + offset; }
};

template <class Acc>
MMFAST_NOINLINE Moments<Acc> layer_moments(const Acc* row, int64_t count, double sum, double eps) {
  using P = Plain<Acc>;
  const double each = 1.0 / double(count);
  Moments<Acc> m;
  m.centre = Acc(sum * each);
  double sums[2] = {};
  sum_over_row<Acc>(count, sums, [&](auto at, int64_t i, Vec<Acc>* acc) MMFAST_LAMBDA {
    const Vec<Acc> d = only_lanes(at, at.template load<P>(row + i) - m.centre);
    acc[0] += d;
    acc[1] += d * d;
  });
  const double left = sums[0] * each, variance = sums[1] * each - left * left;
  const double rstd = 1.0 / sqrt((variance < 0 ? 0.0 : variance) + eps);
  m.rstd = Acc(rstd);
  m.offset = Acc(-left * rstd);
  return m;
}
template <class Acc>
MMFAST_INLINE Moments<Acc> rms_moments(int64_t count, double squares, double eps) {
  Moments<Acc> m;
  m.rstd = Acc(1.0 / sqrt(squares / double(count) + eps));
  return m;
}

template <class S>
MMFAST_NOINLINE double row_sum(const typename S::Bits* row, int64_t count) {
  using Acc = typename S::Acc;
  double sums[1] = {};
  sum_over_row<Acc>(count, sums, [&](auto at, int64_t i, Vec<Acc>* acc) MMFAST_LAMBDA {
    acc[0] += at.template load<S>(row + i);
  });
  return sums[0];
}
template <class S>
MMFAST_NOINLINE double row_squares(const typename S::Bits* row, int64_t count) {
  using Acc = typename S::Acc;
  double sums[1] = {};
  sum_over_row<Acc>(count, sums, [&](auto at, int64_t i, Vec<Acc>* acc) MMFAST_LAMBDA {
    const Vec<Acc> v = at.template load<S>(row + i);
    acc[0] += v * v;
  });
  return sums[0];
}
// Storage -> scratch; returns the sum.
template <class S>
MMFAST_NOINLINE double take_row(const typename S::Bits* row, typename S::Acc* to, int64_t count) {
  using Acc = typename S::Acc;
  double sums[1] = {};
  sum_over_row<Acc>(count, sums, [&](auto at, int64_t i, Vec<Acc>* acc) MMFAST_LAMBDA {
    const Vec<Acc> v = at.template load<S>(row + i);
    keep(at, to + i, v);
    acc[0] += v;
  });
  return sums[0];
}

// out = normal(row) * factor + addend, while the row that comes next is fetched.
template <class SV, class S>
MMFAST_NOINLINE void put_normal(const typename SV::Bits* row, Moments<typename S::Acc> m,
                                const typename S::Acc* factor, const typename S::Acc* addend,
                                typename S::Bits* out, int64_t count, bool stream, const void* next,
                                const void* next_too) {
  using Acc = typename S::Acc;
  each_vector<S>(count, stream ? out : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
    ahead(next, i * int64_t(sizeof(typename S::Bits)));
    ahead(next_too, i * int64_t(sizeof(typename S::Bits)));
    const Vec<Acc> n = m.normal(at.template load<SV>(row + i));
    at.template store<S>(out + i, n * at.template load<Plain<Acc>>(factor + i) +
                                      at.template load<Plain<Acc>>(addend + i));
  });
}

// ---- backward ---------------------------------------------------------------------------------

// Of the gradient dn = d * factor of the normalised row n: its mean and the mean of dn * n.
template <class Acc>
struct Means {
  Acc dn = 0, dn_n = 0;
};

// Sums over rows that the gradients of weights are made of.
template <class Acc>
struct ColumnSums {
  Acc *d_n = nullptr, *d = nullptr;  // of d * n and of d
};

// What a task sums lies in its own piece of memory, `stride` elements each, and starts at 0.
template <class Acc>
MMFAST_INLINE Acc* start_sums(void* all, int64_t task, int64_t stride, int64_t count) {
  if (all == nullptr) return nullptr;
  Acc* mine = static_cast<Acc*>(all) + task * stride;
  fill_row(mine, count, Acc(0));
  return mine;
}

template <class SD, bool SUMS>
MMFAST_NOINLINE Means<typename SD::Acc> take_gradient(
    const typename SD::Bits* d, const typename SD::Acc* row, Moments<typename SD::Acc> m,
    const typename SD::Acc* factor, ColumnSums<typename SD::Acc> columns, int64_t count,
    const void* next, const void* next_too) {
  using Acc = typename SD::Acc;
  using P = Plain<Acc>;
  double sums[2] = {};
  sum_over_row<Acc>(count, sums, [&](auto at, int64_t i, Vec<Acc>* acc) MMFAST_LAMBDA {
    ahead(next, i * int64_t(sizeof(typename SD::Bits)));
    ahead(next_too, i * int64_t(sizeof(typename SD::Bits)));
    const Vec<Acc> n = only_lanes(at, m.normal(at.template load<P>(row + i)));
    const Vec<Acc> g = at.template load<SD>(d + i);
    const Vec<Acc> dn = g * at.template load<P>(factor + i);
    acc[0] += dn;
    acc[1] += dn * n;
    if constexpr (SUMS) {
      at.template store<P>(columns.d_n + i, at.template load<P>(columns.d_n + i) + g * n);
      at.template store<P>(columns.d + i, at.template load<P>(columns.d + i) + g);
    }
  });
  const double each = 1.0 / double(count);
  return {Acc(sums[0] * each), Acc(sums[1] * each)};
}

// to = rstd * (dn - mean(dn) - n * mean(dn * n))
template <class SD, class ST>
MMFAST_NOINLINE void put_gradient(const typename SD::Bits* d, const typename SD::Acc* row,
                                  Moments<typename SD::Acc> m, Means<typename SD::Acc> means,
                                  const typename SD::Acc* factor, typename ST::Bits* to,
                                  int64_t count, bool stream, const void* next,
                                  const void* next_too) {
  using Acc = typename SD::Acc;
  using P = Plain<Acc>;
  each_vector<ST>(count, stream ? to : nullptr, [&](auto at, int64_t i) MMFAST_LAMBDA {
    ahead(next, i * int64_t(sizeof(typename SD::Bits)));
    ahead(next_too, i * int64_t(sizeof(typename SD::Bits)));
    const Vec<Acc> n = m.normal(at.template load<P>(row + i));
    // Equal dn must cancel against their mean: rstd may be large.
    const Vec<Acc> dn = settled(at.template load<SD>(d + i) * at.template load<P>(factor + i));
    at.template store<ST>(to + i, ((dn - means.dn) - n * means.dn_n) * m.rstd);
  });
}

}  // namespace
