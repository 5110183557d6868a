// exp, sigmoid and tanh for fuse, by the storage of their argument: those of activations.h, or
// for two-byte storage some that are right to 14 bits and take half the time: bf16 has 8, fp16 11.
#pragma once
#include "activations.h"

namespace {

struct Precise {
  template <class T>
  MMFAST_INLINE Vec<T> decay(Vec<T> x) {
    return exp_negative(x);
  }
  template <class T>
  MMFAST_INLINE Vec<T> inverse(Vec<T> x) {
    return reciprocal(x);
  }
  template <class T>
  MMFAST_INLINE Logistic<T> logistic(Vec<T> x) {
    return ::logistic<T>(x);
  }
  template <class T>
  MMFAST_INLINE Vec<T> tanh(Vec<T> x) {
    return Tanh::value<T>(x);
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> tanh_both(Vec<T> x) {
    return Tanh::both<T>(x);
  }
};

// For weights that are made once for a whole row or for many rows: all of a tensor may then be as
// small as one tiny weight, which has to be right to its last bits.
struct Exact {
  template <class T>
  MMFAST_INLINE Vec<T> decay(Vec<T> x) {
    return ::decay(x).value();
  }
  template <class T>
  MMFAST_INLINE Vec<T> inverse(Vec<T> x) {
    return T(1) / x;
  }
  template <class T>
  MMFAST_INLINE Logistic<T> logistic(Vec<T> x) {
    const Vec<T> e = decay<T>(negative_abs_v(x));
    const Vec<T> near = T(1) / (e + T(1)), far = e * near;
    return {x < T(0) ? far : near, x < T(0) ? near : far, far * near};
  }
};

// As in activations.h nothing is a small difference of large numbers, NaN stays NaN and infinities
// are met exactly.
struct Coarse {
  // e^x, x <= 0
  template <class T>
  MMFAST_INLINE Vec<T> decay(Vec<T> x) {
    return parts(x).value();
  }
  // 1 / x, x >= 1
  template <class T>
  MMFAST_INLINE Vec<T> inverse(Vec<T> x) {
#if defined(__AVX512F__)
    return (VFloat)_mm512_maskz_rcp14_ps(kAll, (__m512)x);
#else
    return T(1) / x;
#endif
  }
  template <class T>
  MMFAST_INLINE Logistic<T> logistic(Vec<T> x) {
    const Vec<T> e = parts(negative_abs_v(x)).value();
    const Vec<T> near = inverse<T>(e + T(1)), far = e * near;
    return {x < T(0) ? far : near, x < T(0) ? near : far, far * near};
  }
  template <class T>
  MMFAST_INLINE Vec<T> tanh(Vec<T> x) {
    return tanh_both<T>(x).value;
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> tanh_both(Vec<T> x) {
    const Decay<T> d = parts(negative_abs_v(x) * T(2));
    const Vec<T> e = d.value(), r = inverse<T>(e + T(1));
    return {with_sign(-d.minus_one() * r, x), (e * r) * (r * T(4))};
  }

 private:
  // e^x = 2^n 2^f; 2^f - 1 to 1.5e-5 of itself on [-0.5, 0.5].
  MMFAST_INLINE Decay<float> parts(VFloat x) {
#if defined(__AVX512F__)
    const __m512 t = _mm512_maskz_max_ps(kAll, _mm512_set1_ps(-160.0f), (__m512)(x * kLog2));
    const __m512 n =
        _mm512_maskz_roundscale_ps(kAll, t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const VFloat f = (VFloat)t - (VFloat)n;
    const VFloat scale = (VFloat)_mm512_maskz_scalef_ps(kAll, _mm512_set1_ps(1.0f), n);
#else
    const VFloat bounded = x < -87.0f ? splat(-87.0f) : x;
    const VFloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const VFloat t = bounded * kLog2, shifted = t + magic;
    const VFloat f = t - (shifted - magic);
    const VFloat power = (VFloat)(((VInt)shifted - (VInt)magic + 127) << 23);
    const VFloat scale = x < -87.0f ? VFloat{} : power;
#endif
    VFloat p = f * 9.618090465664864e-3f + 5.583728849887848e-2f;
    p = p * f + 0.24023252725601196f;
    p = p * f + 0.6931368708610535f;
    return {scale, p * f};
  }
  static constexpr float kLog2 = float(kLog2e);
};

template <class S, int BYTES = int(sizeof(typename S::Bits))>
struct MathOf {
  using M = Precise;
};
template <class S>
struct MathOf<S, 2> {
  using M = Coarse;
};
template <class S>
using Math = typename MathOf<S>::M;

}  // namespace
