// The weights of fuse: from logits and, for the gradient, back; a vector of gates that know
// nothing of each other at a time.
#pragma once
#include "fuse_math.h"
#include "fuse_rows.h"

namespace {

// Logits in, weights out, for `count` modalities (KFIX of them if that is not 0). Returns the
// largest logit, for slope. Mode kFusePair has one logit and two weights.
template <class M, int MODE, int KFIX, class T>
MMFAST_INLINE Vec<T> weigh(int count, Vec<T>* w) {
  using V = Vec<T>;
  const int n = KFIX ? KFIX : count;
  if constexpr (MODE == mmfast::kFuseSoftmax) {
    V most = splat(-T(__builtin_inf()));
    for (int j = 0; j < n; ++j) most = max_dropping_nan(w[j], most);
    V sum = {};
    for (int j = 0; j < n; ++j) {
      // Equal logits first: inf - inf is no distance.
      w[j] = M::template decay<T>(w[j] == most ? V{} : w[j] - most);
      sum += w[j];
    }
    // -inf everywhere is a weight of 0 everywhere; a NaN stays one.
    const V scale = most > -T(__builtin_inf()) ? M::template inverse<T>(sum) : sum - sum;
    for (int j = 0; j < n; ++j) w[j] *= scale;
    return most;
  } else if constexpr (MODE == mmfast::kFusePair) {
    const Logistic<T> z = M::template logistic<T>(w[0]);
    w[0] = z.up;
    w[1] = z.down;
    return V{};
  } else {
    for (int j = 0; j < n; ++j) w[j] = M::template logistic<T>(w[j]).up;
    return V{};
  }
}

// The gradient of the logits from the weights and d, the gradient of the weights; in place.
template <int MODE, int KFIX, class T>
MMFAST_INLINE void slope(int count, const Vec<T>* w, Vec<T>* d, Vec<T> most) {
  using V = Vec<T>;
  const int n = KFIX ? KFIX : count;
  if constexpr (MODE == mmfast::kFuseSoftmax) {
    V mean = {};
    for (int j = 0; j < n; ++j) mean += w[j] * d[j];
    // Where a logit is inf the weights are constants.
    const auto fixed = (most == T(__builtin_inf())) & (w[0] == w[0]);
    for (int j = 0; j < n; ++j) d[j] = fixed ? V{} : w[j] * (d[j] - mean);
  } else if constexpr (MODE == mmfast::kFusePair) {
    d[0] = w[0] * w[1] * (d[0] - d[1]);
  } else {
    for (int j = 0; j < n; ++j) d[j] *= w[j] * (T(1) - w[j]);
  }
}

// Up to L rows with one weight for each modality, a row a lane: w[k * L + i] is row i's.
template <class T>
struct Batch {
  static constexpr int L = lanes<T>();
  T w[kMost * L], d[kMost * L];
  Vec<T> most;
  int64_t b[L], n[L];
  int rows = 0;

  MMFAST_ONCE void make(const mmfast::FuseArgs& a) {
    WithStore<T>::call(a.logits.dtype, [&](auto s) MMFAST_LAMBDA {
      using LS = decltype(s);
      for (int i = 0; i < rows; ++i) {
        const auto* l = row_at<const typename LS::Bits>(a.logits, b[i], n[i]);
        for (int64_t k = 0; k < a.gates; ++k) w[k * L + i] = LS::get(l + k * a.logits_k);
        if (a.present != nullptr) mask(a, i);
      }
    });
    for (int i = rows; i < L; ++i)
      for (int64_t k = 0; k < a.gates; ++k) w[k * L + i] = 0;
    with_mode(a.mode, [&](auto mode) MMFAST_LAMBDA {
      Vec<T> v[kMost];
      for (int64_t k = 0; k < a.gates; ++k) v[k] = load(w + k * L);
      most = weigh<Exact, decltype(mode)::value, 0, T>(int(a.K), v);
      for (int64_t k = 0; k < a.K; ++k) store(w + k * L, v[k]);
    });
  }
  // d, the gradient of the weights, becomes that of the logits.
  MMFAST_ONCE void turn(const mmfast::FuseArgs& a) {
    with_mode(a.mode, [&](auto mode) MMFAST_LAMBDA {
      Vec<T> v[kMost], dv[kMost];
      for (int64_t k = 0; k < a.K; ++k) v[k] = load(w + k * L), dv[k] = load(d + k * L);
      slope<decltype(mode)::value, 0, T>(int(a.K), v, dv, most);
      for (int64_t k = 0; k < a.gates; ++k) store(d + k * L, dv[k]);
    });
  }
  // Whether gate k of row i belongs to a modality that is there.
  MMFAST_MEMBER bool has(const mmfast::FuseArgs& a, int i, int64_t k) const {
    if (a.present == nullptr) return true;
    const uint8_t* there = a.present + b[i] * a.K;
    return a.gates == a.K ? there[k] != 0 : (there[0] | there[1]) != 0;
  }

 private:
  // Whatever the logit of an absent modality holds, it takes part in nothing.
  MMFAST_MEMBER void mask(const mmfast::FuseArgs& a, int i) {
    for (int64_t k = 0; k < a.gates; ++k)
      if (!has(a, i, k)) w[k * L + i] = a.gates == a.K ? -T(__builtin_inf()) : T(0);
  }
};

// Calls f() for the rows of a span in batches whose weights are made.
template <class T, class F>
MMFAST_INLINE void each_batch(const mmfast::FuseArgs& a, Span rows, Batch<T>& batch, const F& f) {
  using mmfast::FuseSharing;
  // The same weights in every row.
  const bool same =
      a.sharing == FuseSharing::ITEM || (a.sharing != FuseSharing::NOTHING && a.present == nullptr);
  bool made = false;
  int64_t left = rows.to - rows.from;
  batch.rows = 0;
  each_row_of(a, rows, [&](int64_t b, int64_t n) MMFAST_LAMBDA {
    batch.b[batch.rows] = b;
    batch.n[batch.rows] = n;
    ++batch.rows;
    --left;
    if (batch.rows < batch.L && left > 0) return;
    if (!made || !same) batch.make(a);
    made = true;
    f();
    batch.rows = 0;
  });
}

// Weights per channel that many rows share: modality k's for `width` columns at w + k * width.
template <class T>
struct Table {
  int64_t width;
  T *w, *d, *most;

  // Twice as many weights as fit into the first cache would be read from the second.
  static int64_t width_of(const mmfast::FuseArgs& a) {
    return even_pieces(a.C, max64(4096 / max64(a.K, 1), 64), lanes<T>());
  }
  static int64_t bytes(const mmfast::FuseArgs& a) {
    return (2 * a.K + 1) * width_of(a) * int64_t(sizeof(T));
  }
  Table(const mmfast::FuseArgs& a, T* scratch)
      : width(width_of(a)), w(scratch), d(w + a.K * width), most(d + a.K * width) {}

  // Columns [c0, c0 + columns) for the modalities present; nothing of the others is read.
  MMFAST_ONCE void make(const mmfast::FuseArgs& a, const Presence& present, int64_t b, int64_t n,
                        int64_t c0, int64_t columns) {
    if (present.count == 0) return;
    WithStore<T>::call(a.logits.dtype, [&](auto s) MMFAST_LAMBDA {
      using LS = decltype(s);
      const typename LS::Bits* l[kMost];
      point_logits<LS>(a, present, b, n, l);
      with_mode(a.mode, [&](auto mode) MMFAST_LAMBDA {
        const List list(a, present);
        each_step<Plain<T>, 1>(columns, false, [&](auto at, auto, int64_t c) MMFAST_LAMBDA {
          Vec<T> v[kMost];
          for (int j = 0; j < list.gates; ++j) v[j] = at.template load<LS>(l[j] + c0 + c);
          const Vec<T> m = weigh<Exact, decltype(mode)::value, 0, T>(list.weights, v);
          for (int j = 0; j < list.weights; ++j)
            at.template store<Plain<T>>(w + list.index(j) * width + c, v[j]);
          at.template store<Plain<T>>(most + c, m);
        });
      });
    });
  }
  MMFAST_MEMBER void clear_gradient(const mmfast::FuseArgs& a) {
    memset(d, 0, size_t(a.K * width) * sizeof(T));
  }
  // Adds what rows with these weights left in d to the gradient of the logits: gate k's at
  // sum + k * stride.
  MMFAST_ONCE void turn(const mmfast::FuseArgs& a, const Presence& present, T* sum, int64_t stride,
                        int64_t columns) {
    if (present.count == 0) return;
    with_mode(a.mode, [&](auto mode) MMFAST_LAMBDA {
      const List list(a, present);
      using S = Plain<T>;
      each_step<S, 1>(columns, false, [&](auto at, auto, int64_t c) MMFAST_LAMBDA {
        Vec<T> v[kMost], dv[kMost];
        for (int j = 0; j < list.weights; ++j) {
          v[j] = at.template load<S>(w + list.index(j) * width + c);
          dv[j] = at.template load<S>(d + list.index(j) * width + c);
        }
        const Vec<T> m = at.template load<S>(most + c);
        slope<decltype(mode)::value, 0, T>(list.weights, v, dv, m);
        for (int j = 0; j < list.gates; ++j) {
          T* p = sum + list.index(j) * stride + c;
          at.template store<S>(p, at.template load<S>(p) + dv[j]);
        }
      });
    });
  }

 private:
  // The pair has both weights whoever is present, and one logit.
  struct List {
    const Presence& present;
    const bool pair;
    const int gates, weights;
    List(const mmfast::FuseArgs& a, const Presence& p)
        : present(p),
          pair(a.mode == mmfast::kFusePair),
          gates(pair ? 1 : p.count),
          weights(pair ? 2 : p.count) {}
    int index(int j) const { return pair ? j : present.index[j]; }
  };
};

}  // namespace
