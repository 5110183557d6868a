// Activations and their slopes, a vector at a time. Relative errors are of a few roundings, also
// near 0 and far out: nothing is a small difference of large numbers. NaN stays NaN; infinities
// give what the formula gives (silu(-inf) = -inf * 0 = NaN, as in torch).
#pragma once
#include "vec.h"

namespace {

#if defined(__AVX512F__)
// The forms with a mask of all lanes: g++ 12 warns of its own intrinsics without one.
constexpr __mmask16 kAll = 0xffff;
#endif

MMFAST_INLINE VFloat abs_v(VFloat x) { return (VFloat)((VInt)x & 0x7fffffff); }
MMFAST_INLINE VDouble abs_v(VDouble x) { return (VDouble)((VLong)x & INT64_MAX); }
MMFAST_INLINE VFloat negative_abs_v(VFloat x) { return (VFloat)((VInt)x | INT32_MIN); }
MMFAST_INLINE VDouble negative_abs_v(VDouble x) { return (VDouble)((VLong)x | INT64_MIN); }
// |magnitude| with the sign of `sign`; magnitude must not be negative.
MMFAST_INLINE VFloat with_sign(VFloat magnitude, VFloat sign) {
  return (VFloat)((VInt)magnitude | ((VInt)sign & INT32_MIN));
}
MMFAST_INLINE VDouble with_sign(VDouble magnitude, VDouble sign) {
  return (VDouble)((VLong)magnitude | ((VLong)sign & INT64_MIN));
}

// 1 / x for x in [1, 2^60]
MMFAST_INLINE VFloat reciprocal(VFloat x) {
#if defined(__AVX512F__)
  const VFloat r = (VFloat)_mm512_maskz_rcp14_ps(kAll, (__m512)x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}
MMFAST_INLINE VDouble reciprocal(VDouble x) { return 1.0 / x; }

// e^x for x <= 0 as 2^n (1 + p): `value` = e^x, and e^x - 1 = 2^n p + (2^n - 1) without loss near
// 0. p is -1 + e^r of the rest r, |r| <= ln(2) / 2.
template <class T>
struct Decay {
  Vec<T> scale, p;
  MMFAST_MEMBER Vec<T> value() const { return scale * p + scale; }
  MMFAST_MEMBER Vec<T> minus_one() const { return scale * p + (scale - T(1)); }
};

MMFAST_INLINE Decay<float> decay(VFloat x) {
  // Below -104 the result is 0 anyhow; the bound keeps infinities out of the rest. NaN passes.
#if defined(__AVX512F__)
  const VFloat bounded = (VFloat)_mm512_maskz_max_ps(kAll, _mm512_set1_ps(-110.0f), (__m512)x);
  const VFloat n = (VFloat)_mm512_maskz_roundscale_ps(
      kAll, (__m512)(bounded * float(kLog2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VFloat bounded = x < -87.0f ? splat(-87.0f) : x;
  const VFloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VFloat shifted = bounded * float(kLog2e) + magic;
  const VFloat n = shifted - magic;
#endif
  // ln(2) in two parts, of which the first times n is exact.
  const VFloat r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  VFloat q = r * 1.9875691500e-4f + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  const VFloat p = (r * r) * q + r;
#if defined(__AVX512F__)
  return {(VFloat)_mm512_maskz_scalef_ps(kAll, _mm512_set1_ps(1.0f), (__m512)n), p};
#else
  const VFloat scale = (VFloat)(((VInt)shifted - (VInt)magic + 127) << 23);
  return {x < -87.0f ? VFloat{} : scale, p};
#endif
}

MMFAST_INLINE Decay<double> decay(VDouble x) {
  const VDouble bounded = x < -708.0 ? splat(-708.0) : x;
  const VDouble magic = splat(6755399441055744.0);  // 1.5 * 2^52
  const VDouble shifted = bounded * kLog2e + magic;
  const VDouble n = shifted - magic;
  const VDouble r = (bounded - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  VDouble q = splat(1.0 / 87178291200.0);  // Taylor to degree 14
  const double inverse_factorial[12] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0,
                                        1.0 / 3628800.0,    1.0 / 362880.0,    1.0 / 40320.0,
                                        1.0 / 5040.0,       1.0 / 720.0,       1.0 / 120.0,
                                        1.0 / 24.0,         1.0 / 6.0,         0.5};
  MMFAST_UNROLL
  for (int i = 0; i < 12; ++i) q = q * r + inverse_factorial[i];
  const VDouble p = (r * r) * q + r;
  const VDouble scale = (VDouble)(((VLong)shifted - (VLong)magic + 1023) << 52);
  return {x < -708.0 ? VDouble{} : scale, p};
}

template <class T>
struct ValueSlope {
  Vec<T> value, slope;
};

// sigmoid(x) and sigmoid(-x), both with full relative precision, and sigmoid'(x).
template <class T>
struct Logistic {
  Vec<T> up, down, slope;
};
template <class T>
MMFAST_INLINE Logistic<T> logistic(Vec<T> x) {
  const Vec<T> e = decay(negative_abs_v(x)).value();
  const Vec<T> near = reciprocal(e + T(1)), far = e * near;
  return {x < T(0) ? far : near, x < T(0) ? near : far, far * near};
}

struct Tanh {
  template <class T>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    const Decay<T> d = decay(negative_abs_v(x) * T(2));
    return with_sign(-d.minus_one() * reciprocal(d.value() + T(1)), x);
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    const Decay<T> d = decay(negative_abs_v(x) * T(2));
    const Vec<T> e = d.value(), r = reciprocal(e + T(1));
    return {with_sign(-d.minus_one() * r, x), (e * r) * (r * T(4))};
  }
};

struct Sigmoid {
  template <class T>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    return logistic<T>(x).up;
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    const Logistic<T> s = logistic<T>(x);
    return {s.up, s.slope};
  }
};

struct Identity {
  template <class T>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    return x;
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    return {x, splat(T(1))};
  }
};

struct Relu {
  template <class T>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    return x <= T(0) ? Vec<T>{} : x;
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    return {x <= T(0) ? Vec<T>{} : x, x <= T(0) ? Vec<T>{} : splat(T(1))};
  }
};

struct Silu {
  template <class T>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    return x * logistic<T>(x).up;
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    const Logistic<T> s = logistic<T>(x);
    return {x * s.up, x * s.slope + s.up};
  }
};

// x sigmoid(2u) = x (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  template <class T>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    return x * logistic<T>(twice_u<T>(x)).up;
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    const Logistic<T> s = logistic<T>(twice_u<T>(x));
    const Vec<T> slope_u = x * x * T(3 * kCubic * kScale) + T(kScale);
    return {x * s.up, (x * s.slope) * slope_u + s.up};
  }

 private:
  static constexpr double kScale = 1.59576912160573071176;  // 2 sqrt(2 / pi)
  static constexpr double kCubic = 0.044715;
  template <class T>
  MMFAST_INLINE Vec<T> twice_u(Vec<T> x) {
    return x * (x * x * T(kCubic * kScale) + T(kScale));
  }
};

// x Phi(x), Phi the normal distribution function: Phi(-|x|) = exp(-x^2 / 2) q(|x|) with q smooth.
struct Gelu {
  template <class T>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    return x * normal<T>(x).value;
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    const ValueSlope<T> phi = normal<T>(x);
    return {x * phi.value, x * phi.slope + phi.value};
  }

 private:
  MMFAST_INLINE VFloat at_most_16(VFloat x) { return x > 16.0f ? splat(16.0f) : x; }
  // Phi(x) and its density
  template <class T>
  MMFAST_INLINE ValueSlope<T> normal(Vec<T> x) {
    const Vec<T> e = decay(x * x * T(-0.5)).value();
    const Vec<T> density = e * T(0.39894228040143267794);
    if constexpr (sizeof(T) == 8) {
      Vec<T> phi;
      for (int i = 0; i < lanes<T>(); ++i) phi[i] = 0.5 * erfc(x[i] * -0.70710678118654752440);
      return {phi, density};
    } else {
      // q as t times a polynomial in t = 1 / (1 + 0.4 |x|), fitted: Phi to 1.1e-8 before rounding.
      // The bound keeps an infinite x out of 0 * inf; e is 0 there.
      const Vec<T> t = reciprocal(at_most_16(abs_v(x)) * T(0.4) + T(1));
      Vec<T> q = t * T(-0.03599066235253466) + T(0.18335675834249296);
      q = q * t + T(-0.3390568754200309);
      q = q * t + T(0.21303950655131837);
      q = q * t + T(0.01221675956037132);
      q = q * t + T(0.14883802170652408);
      q = q * t + T(0.15794742356092253);
      q = q * t + T(0.1596490571296164);
      const Vec<T> tail = e * (q * t);
      return {x < T(0) ? tail : T(1) - tail, density};
    }
  }
};

}  // namespace
