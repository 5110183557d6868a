// Activations and their slopes, a vector at a time. Relative errors are of a few roundings, also
// near 0 and far out: nothing is a small difference of large numbers. NaN stays NaN; values at
// infinities are what the formula gives (silu(-inf) = -inf * 0 = NaN, as in torch), slopes there
// may be another non-finite number. COARSE forms, for results in 16 bits, say how right they are:
// those of gelu lose relative digits below -4, where torch's own do too.
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

#if defined(__AVX512F__)
// e^x for |x| <= 127, inf and 0 where float ends: 2^(n + k/16) from a table of k, which the permute
// reads from the low bits of the rounded exponent, times 2^g with |g| <= 1/32, a cubic. A third
// fewer instructions than decay, but 1 - e^x from it would lose what is near 0.
template <bool COARSE = false>  // a square instead of the cubic: right to 2e-6
MMFAST_INLINE VFloat exp_by_table(VFloat x) {
  const VFloat table = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f,
                        1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                        1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                        1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  const VFloat magic = splat(786432.0f);  // 1.5 * 2^19: adding it rounds to sixteenths
  const VFloat shifted = x * float(kLog2e) + magic;
  const VFloat n = shifted - magic;
  const VFloat g = x * float(kLog2e) - n;
  const VFloat p = COARSE ? g * (g * 0.240226507f + 0.693147181f)
                          : g * ((g * 0.0555041087f + 0.240226507f) * g + 0.693147181f);
  const VFloat t = (VFloat)_mm512_maskz_permutexvar_ps(kAll, (__m512i)shifted, (__m512)table);
  return (VFloat)_mm512_maskz_scalef_ps(kAll, (__m512)(t * p + t), (__m512)n);
}
#endif

#if defined(__AVX512F__)
// e^-x for |x| <= most, beyond as at that bound; NaN counts as a large number.
template <bool COARSE = false>
MMFAST_INLINE VFloat exp_minus(VFloat x, float most) {
  // The smaller of two magnitudes, with the sign of the first
  const __m512 bounded = _mm512_maskz_range_ps(kAll, (__m512)x, _mm512_set1_ps(most), 2);
  return exp_by_table<COARSE>(-(VFloat)bounded);
}
#endif

// e^x for x <= 0, also -inf
MMFAST_INLINE VFloat exp_negative(VFloat x) {
#if defined(__AVX512F__)
  return exp_by_table((VFloat)_mm512_maskz_max_ps(kAll, _mm512_set1_ps(-127.0f), (__m512)x));
#else
  return decay(x).value();
#endif
}
MMFAST_INLINE VDouble exp_negative(VDouble x) { return decay(x).value(); }

template <class T>
struct ValueSlope {
  Vec<T> value, slope;
};

// The normal distribution function. Not inlined: a loop over lanes inside a kernel would make the
// compiler fuse the multiply-adds around it differently in each place.
MMFAST_NOINLINE __attribute__((unused)) VDouble normal_cdf(VDouble x) {
  VDouble phi;
  for (int i = 0; i < lanes<double>(); ++i) phi[i] = 0.5 * erfc(x[i] * -0.70710678118654752440);
  return phi;
}

// sigmoid(x), sigmoid(-x) and sigmoid'(x), each with full relative precision.
template <class T>
struct Logistic {
  Vec<T> up, down, slope;
};
template <class T>
MMFAST_INLINE Logistic<T> logistic(Vec<T> x) {
  const Vec<T> e = exp_negative(negative_abs_v(x));
  const Vec<T> near = T(1) / (e + T(1)), far = e * near;
  return {x < T(0) ? far : near, x < T(0) ? near : far, far * near};
}

// x * sigmoid(z). NaN and inf come from x: z is finite or goes with it.
template <class T, bool COARSE>
MMFAST_INLINE Vec<T> times_sigmoid(Vec<T> x, Vec<T> z) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4 && COARSE)  // right to 7e-5
    return x * (VFloat)_mm512_maskz_rcp14_ps(kAll, (__m512)(exp_minus<true>(z, 127.0f) + 1.0f));
  else if constexpr (sizeof(T) == 4)
    return x / (exp_minus(z, 127.0f) + 1.0f);
  else
#endif
    return x * logistic<T>(z).up;
}
// sigmoid(z) and 1 - sigmoid(z), for factors of x; NaN as above.
template <class T>
struct Shares {
  Vec<T> on, off;
};
template <class T>
MMFAST_INLINE Shares<T> shares(Vec<T> z) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const VFloat e = exp_minus(z, 80.0f), on = 1.0f / (e + 1.0f);  // e stays finite
    return {on, e * on};
  } else
#endif
  {
    const Logistic<T> s = logistic<T>(z);
    return {s.up, s.down};
  }
}

// COARSE: the result will be rounded to 16 bits; some have a shorter way then.
struct Tanh {
  template <class T, bool COARSE = false>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    const Decay<T> d = decay(negative_abs_v(x) * T(2));
    return with_sign(-d.minus_one() / (d.value() + T(1)), x);
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    const Decay<T> d = decay(negative_abs_v(x) * T(2));
    const Vec<T> e = d.value(), r = T(1) / (e + T(1));
    return {with_sign(-d.minus_one() * r, x), (e * r) * (r * T(4))};
  }
};

struct Sigmoid {
  template <class T, bool COARSE = false>
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
  template <class T, bool COARSE = false>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    return x;
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    return {x, splat(T(1))};
  }
};

struct Relu {
  template <class T, bool COARSE = false>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    return x <= T(0) ? Vec<T>{} : x;
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    return {x <= T(0) ? Vec<T>{} : x, x <= T(0) ? Vec<T>{} : splat(T(1))};
  }
};

struct Silu {
  template <class T, bool COARSE = false>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    return times_sigmoid<T, COARSE>(x, x);
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    const Shares<T> s = shares<T>(x);
    const Vec<T> value = x * s.on;
    return {value, value * s.off + s.on};
  }
};

// x sigmoid(2u) = x (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  template <class T, bool COARSE = false>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    return times_sigmoid<T, COARSE>(x, twice_u<T>(x));
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    const Shares<T> s = shares<T>(twice_u<T>(x));
    const Vec<T> slope_u = x * x * T(3 * kCubic * kScale) + T(kScale), value = x * s.on;
    return {value, (value * s.off) * slope_u + s.on};
  }

 private:
  static constexpr double kScale = 1.59576912160573071176;  // 2 sqrt(2 / pi)
  static constexpr double kCubic = 0.044715;
  template <class T>
  MMFAST_INLINE Vec<T> twice_u(Vec<T> x) {
    return x * (x * x * T(kCubic * kScale) + T(kScale));
  }
};

// x Phi(x), Phi the normal distribution function.
struct Gelu {
  // COARSE: right to 6e-7, for results in 16 bits
  template <class T, bool COARSE = false>
  MMFAST_INLINE Vec<T> value(Vec<T> x) {
    if constexpr (sizeof(T) == 8)
      return x * normal_cdf(x);
    else if constexpr (COARSE)
      return x * (half_phi(x) + 0.5f);
    else
      return x * from_tail(x, exp_negative(x * x * -0.5f));
  }
  template <class T>
  MMFAST_INLINE ValueSlope<T> both(Vec<T> x) {
    const Vec<T> e = exp_negative(x * x * T(-0.5)), density = e * T(0.39894228040143267794);
    if constexpr (sizeof(T) == 8) {
      const Vec<T> phi = normal_cdf(x);
      return {x * phi, x * density + phi};
    } else {
      const Vec<T> phi = from_tail(x, e);
      return {x * phi, x * density + phi};
    }
  }

 private:
  // Phi(x) - 1/2 = x P(x^2) / Q(x^2) up to |x| = 5.48, fitted: 7.5e-8 before rounding. At 5.48 it
  // comes out as 1/2 exactly, so that Phi is 0 or 1 from there on. NaN comes from the factor x of
  // the caller.
  MMFAST_INLINE VFloat half_phi(VFloat x) {
#if defined(__AVX512F__)
    const VFloat z = (VFloat)_mm512_maskz_range_ps(kAll, (__m512)x, _mm512_set1_ps(5.48f), 2);
#else
    const VFloat z = x > 5.48f ? splat(5.48f) : (x < -5.48f ? splat(-5.48f) : x);
#endif
    const VFloat u = z * z;
    VFloat p = u * 2.1710601465025823e-08f + 6.5905755523621814e-06f;
    p = p * u + 0.00019015497251720993f;
    p = p * u + 0.004805417412571935f;
    p = p * u + 0.03584715126640663f;
    p = p * u + 0.39894190095036886f;
    VFloat q = u * 1.1851537504617164e-06f + 8.101089003823347e-05f;
    q = q * u + 0.002003352624357041f;
    q = q * u + 0.029803939987160712f;
    q = q * u + 0.2565182268855229f;
    q = q * u + 1.0f;
    return (z * p) / q;
  }
  MMFAST_INLINE VFloat at_most_16(VFloat x) { return x > 16.0f ? splat(16.0f) : x; }
  // Phi(-|x|) = exp(-x^2 / 2) q(|x|), and q smooth: t times a polynomial in t = 1 / (1 + 0.4 |x|),
  // fitted: Phi to 1.1e-8 before rounding. The bound keeps an infinite x out of 0 * inf.
  MMFAST_INLINE VFloat from_tail(VFloat x, VFloat e) {
    const VFloat t = 1.0f / (at_most_16(abs_v(x)) * 0.4f + 1.0f);
    VFloat q = t * -0.03599066235253466f + 0.18335675834249296f;
    q = q * t + -0.3390568754200309f;
    q = q * t + 0.21303950655131837f;
    q = q * t + 0.01221675956037132f;
    q = q * t + 0.14883802170652408f;
    q = q * t + 0.15794742356092253f;
    q = q * t + 0.1596490571296164f;
    const VFloat tail = e * (q * t);
    return x < 0.0f ? tail : 1.0f - tail;
  }
};

}  // namespace
