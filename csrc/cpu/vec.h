// The vector layer of the CPU kernels: GCC/Clang vector extensions of MMFAST_VECTOR_BYTES bytes,
// with intrinsics only where the extensions cannot say it. Included once by every
// instruction-set file; everything has internal linkage, so that no code compiled for one
// processor can be picked by the linker for another. No STL and no torch headers here.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../common/dtype.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define MMFAST_INLINE static inline __attribute__((always_inline))
#define MMFAST_MEMBER inline __attribute__((always_inline))  // of a class, not static
#define MMFAST_LAMBDA __attribute__((always_inline))         // after a lambda's parameters
#define MMFAST_NOINLINE static __attribute__((noinline))
#define MMFAST_UNROLL _Pragma("GCC unroll 32")

namespace {

constexpr int kVectorBytes = MMFAST_VECTOR_BYTES;

typedef float VFloat __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
typedef double VDouble __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
typedef int32_t VInt __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
typedef uint32_t VUint __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
typedef int64_t VLong __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
typedef uint16_t VHalfBits __attribute__((vector_size(MMFAST_VECTOR_BYTES / 2)));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using V = VFloat;
  using Mask = VInt;
  using Int = int32_t;
};
template <>
struct VecOf<double> {
  using V = VDouble;
  using Mask = VLong;
  using Int = int64_t;
};
template <>
struct VecOf<uint32_t> {
  using V = VUint;
  using Mask = VInt;
  using Int = int32_t;
};
template <class T>
using Vec = typename VecOf<T>::V;

template <class T>
constexpr int lanes() {
  return kVectorBytes / int(sizeof(T));
}

template <class T>
MMFAST_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T, class V>
MMFAST_INLINE void store(T* p, V v) {
  memcpy(p, &v, sizeof v);
}
template <class T>
MMFAST_INLINE Vec<T> splat(T x) {
  if constexpr (sizeof(T) == 4 && T(-1) > T(0))
    return x | Vec<T>{};
  else
    return x - Vec<T>{};
}
template <class T>
MMFAST_INLINE typename VecOf<T>::Mask lane_index() {
  typename VecOf<T>::Mask v;
  for (int i = 0; i < lanes<T>(); ++i) v[i] = i;
  return v;
}
// NaN in `v` is dropped in favour of `best`: a NaN score must not become the row's maximum.
template <class V>
MMFAST_INLINE V max_dropping_nan(V v, V best) {
  return v > best ? v : best;
}

template <class T>
MMFAST_INLINE T reduce_max(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps((__m512)v);
#endif
  T m = v[0];
  for (int i = 1; i < lanes<T>(); ++i) m = v[i] > m ? v[i] : m;
  return m;
}
template <class T>
MMFAST_INLINE T reduce_add(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
  // A fixed tree: the same bits at every call.
  T x[lanes<T>()];
  store(x, v);
  for (int width = lanes<T>() / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// 2^x. Exactly 0 at -inf, inf past the range, NaN stays NaN; below the normal range it may flush
// to 0. Degree-6 minimax polynomial on [-0.5, 0.5]: relative error 1.9e-9 before rounding.
MMFAST_INLINE VFloat exp2_poly(VFloat f) {
  VFloat p = f * 0.0001534581242594868f + 0.0013399930903688073f;
  p = p * f + 0.009618489071726799f;
  p = p * f + 0.05550328642129898f;
  p = p * f + 0.24022646248340607f;
  p = p * f + 0.6931471824645996f;
  return p * f + 1.0f;
}
MMFAST_INLINE VFloat exp2v(VFloat x) {
#if defined(__AVX512F__)
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-1000.0f), (__m512)x);
  const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(1000.0f), clamped);
  const __m512 n = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const VFloat f = (VFloat)_mm512_sub_ps(bounded, n);
  return (VFloat)_mm512_scalef_ps((__m512)exp2_poly(f), n);
#else
  const VFloat bounded = x < -126.0f ? splat(-126.0f) : (x > 128.0f ? splat(128.0f) : x);
  const VFloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VFloat shifted = bounded + magic;
  const VFloat f = bounded - (shifted - magic);
  const VInt n = (VInt)shifted - (VInt)magic;
  // 2^n in two steps, so that n = 128 gives inf only where the product does.
  const VInt half = n >> 1;
  const VFloat scale_a = (VFloat)((half + 127) << 23);
  const VFloat scale_b = (VFloat)((n - half + 127) << 23);
  const VFloat y = exp2_poly(f) * scale_a * scale_b;
  return x < -126.0f ? VFloat{} : (x != x ? x : y);
#endif
}
MMFAST_INLINE VDouble exp2v(VDouble x) {
  const VDouble bounded = x < -1022.0 ? splat(-1022.0) : (x > 1024.0 ? splat(1024.0) : x);
  const VDouble magic = splat(6755399441055744.0);  // 1.5 * 2^52
  const VDouble shifted = bounded + magic;
  const VDouble f = (bounded - (shifted - magic)) * 0.693147180559945309417;
  VDouble p = splat(1.0 / 87178291200.0);  // Taylor to degree 14: |f| <= 0.347
  const double inverse_factorial[14] = {1.0 / 6227020800.0,
                                        1.0 / 479001600.0,
                                        1.0 / 39916800.0,
                                        1.0 / 3628800.0,
                                        1.0 / 362880.0,
                                        1.0 / 40320.0,
                                        1.0 / 5040.0,
                                        1.0 / 720.0,
                                        1.0 / 120.0,
                                        1.0 / 24.0,
                                        1.0 / 6.0,
                                        0.5,
                                        1.0,
                                        1.0};
  for (int i = 0; i < 14; ++i) p = p * f + inverse_factorial[i];
  const VLong n = (VLong)shifted - (VLong)magic;
  const VLong half = n >> 1;
  const VDouble scale_a = (VDouble)((half + 1023) << 52);
  const VDouble scale_b = (VDouble)((n - half + 1023) << 52);
  const VDouble y = p * scale_a * scale_b;
  return x < -1022.0 ? VDouble{} : (x != x ? x : y);
}

constexpr double kLog2e = 1.44269504088896340736;
constexpr double kLn2 = 0.69314718055994530942;

// log2 of positive normal numbers, inf and NaN (the sums of a softmax lie in [1, M]): x = 2^e m
// with m in [sqrt(1/2), sqrt(2)), log2 m from the odd series in s = (m - 1) / (m + 1), |s| < 0.172.
MMFAST_INLINE VFloat log2v(VFloat x) {
  const VInt e = ((VInt)x - 0x3f3504f3) >> 23;
  const VFloat m = (VFloat)((VInt)x - (e << 23));
  const VFloat s = (m - 1.0f) / (m + 1.0f), t = s * s;
  const float c = float(2 * kLog2e);
  VFloat p = t * (c / 9) + c / 7;
  p = p * t + c / 5;
  p = p * t + c / 3;
  p = p * t + c;
  const VFloat y = __builtin_convertvector(e, VFloat) + p * s;
  return x < __builtin_inff() ? y : x;
}
MMFAST_INLINE VDouble log2v(VDouble x) {
  VDouble y;
  for (int i = 0; i < lanes<double>(); ++i) y[i] = log2(x[i]);
  return y;
}

template <class T>
MMFAST_INLINE Vec<T> sigmoidv(Vec<T> x) {
  return T(1) / (T(1) + exp2v(x * T(-kLog2e)));
}

// ---- storage <-> compute, a vector at a time --------------------------------------------------

MMFAST_INLINE VFloat load_bf16(const uint16_t* p) {
  VHalfBits h;
  memcpy(&h, p, sizeof h);
  return (VFloat)(__builtin_convertvector(h, VUint) << 16);
}
MMFAST_INLINE VFloat load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (VFloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (VFloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  VFloat v;
  for (int i = 0; i < lanes<float>(); ++i) v[i] = mmfast::f16_to_float(p[i]);
  return v;
#endif
}
MMFAST_INLINE VUint bf16_bits(VFloat v) {
  const VUint u = (VUint)v;
  const VUint rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return v != v ? splat<uint32_t>(0x7fc0u) : rounded;
}
MMFAST_INLINE void store_bf16(uint16_t* p, VFloat v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  const VHalfBits h = __builtin_convertvector(bf16_bits(v), VHalfBits);
#endif
  memcpy(p, &h, sizeof h);
}
MMFAST_INLINE void store_f16(uint16_t* p, VFloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < lanes<float>(); ++i) p[i] = mmfast::float_to_f16(v[i]);
#endif
}

// How a row in storage is read and written in the compute type. S is a tag, not a value type.
struct StoreF32 {
  using Bits = float;
  using Acc = float;
  MMFAST_INLINE VFloat loadv(const float* p) { return load(p); }
  MMFAST_INLINE void storev(float* p, VFloat v) { store(p, v); }
  MMFAST_INLINE float get(const float* p) { return *p; }
  MMFAST_INLINE void put(float* p, float x) { *p = x; }
};
struct StoreBF16 {
  using Bits = uint16_t;
  using Acc = float;
  MMFAST_INLINE VFloat loadv(const uint16_t* p) { return load_bf16(p); }
  MMFAST_INLINE void storev(uint16_t* p, VFloat v) { store_bf16(p, v); }
  MMFAST_INLINE float get(const uint16_t* p) { return mmfast::bf16_to_float(*p); }
  MMFAST_INLINE void put(uint16_t* p, float x) { *p = mmfast::float_to_bf16(x); }
};
struct StoreF16 {
  using Bits = uint16_t;
  using Acc = float;
  MMFAST_INLINE VFloat loadv(const uint16_t* p) { return load_f16(p); }
  MMFAST_INLINE void storev(uint16_t* p, VFloat v) { store_f16(p, v); }
  MMFAST_INLINE float get(const uint16_t* p) { return mmfast::f16_to_float(*p); }
  MMFAST_INLINE void put(uint16_t* p, float x) { *p = mmfast::float_to_f16(x); }
};
struct StoreF64 {
  using Bits = double;
  using Acc = double;
  MMFAST_INLINE VDouble loadv(const double* p) { return load(p); }
  MMFAST_INLINE void storev(double* p, VDouble v) { store(p, v); }
  MMFAST_INLINE double get(const double* p) { return *p; }
  MMFAST_INLINE void put(double* p, double x) { *p = x; }
};

// Calls f with the storage tag of `dtype`; only the tags that go with the compute type exist.
template <class Acc>
struct WithStore;
template <>
struct WithStore<float> {
  template <class F>
  MMFAST_INLINE void call(mmfast::DType dtype, const F& f) {
    if (dtype == mmfast::DType::F32)
      f(StoreF32{});
    else if (dtype == mmfast::DType::BF16)
      f(StoreBF16{});
    else
      f(StoreF16{});
  }
};
template <>
struct WithStore<double> {
  template <class F>
  MMFAST_INLINE void call(mmfast::DType, const F& f) {
    f(StoreF64{});
  }
};

// count elements of storage -> compute, zeros up to `padded`.
template <class S>
MMFAST_INLINE void read_row(const void* src, typename S::Acc* dst, int64_t count, int64_t padded) {
  constexpr int L = lanes<typename S::Acc>();
  const auto* p = static_cast<const typename S::Bits*>(src);
  int64_t i = 0;
  for (; i + L <= count; i += L) store(dst + i, S::loadv(p + i));
  for (; i < count; ++i) dst[i] = S::get(p + i);
  for (; i < padded; ++i) dst[i] = 0;
}
template <class S>
MMFAST_INLINE void write_row(void* dst, const typename S::Acc* src, int64_t count,
                             typename S::Acc factor) {
  constexpr int L = lanes<typename S::Acc>();
  auto* p = static_cast<typename S::Bits*>(dst);
  int64_t i = 0;
  for (; i + L <= count; i += L) S::storev(p + i, load(src + i) * factor);
  for (; i < count; ++i) S::put(p + i, src[i] * factor);
}

template <class Acc>
MMFAST_INLINE void read_row(mmfast::DType dtype, const void* src, Acc* dst, int64_t count,
                            int64_t padded) {
  WithStore<Acc>::call(dtype, [&](auto s) { read_row<decltype(s)>(src, dst, count, padded); });
}
template <class Acc>
MMFAST_INLINE void write_row(mmfast::DType dtype, void* dst, const Acc* src, int64_t count,
                             Acc factor) {
  WithStore<Acc>::call(dtype, [&](auto s) { write_row<decltype(s)>(dst, src, count, factor); });
}
template <class Acc>
MMFAST_INLINE Acc read_one(mmfast::DType dtype, const void* src, int64_t index) {
  Acc x = 0;
  WithStore<Acc>::call(dtype, [&](auto s) {
    using S = decltype(s);
    x = S::get(static_cast<const typename S::Bits*>(src) + index);
  });
  return x;
}
template <class Acc>
MMFAST_INLINE void write_one(mmfast::DType dtype, void* dst, int64_t index, Acc x) {
  WithStore<Acc>::call(dtype, [&](auto s) {
    using S = decltype(s);
    S::put(static_cast<typename S::Bits*>(dst) + index, x);
  });
}
MMFAST_INLINE const char* byte_offset(const void* p, mmfast::DType dtype, int64_t elements) {
  return static_cast<const char*>(p) + elements * mmfast::dtype_bytes(dtype);
}
MMFAST_INLINE char* byte_offset(void* p, mmfast::DType dtype, int64_t elements) {
  return static_cast<char*>(p) + elements * mmfast::dtype_bytes(dtype);
}

MMFAST_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
MMFAST_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
MMFAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MMFAST_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// The size of equal pieces of at most `most`, a multiple of `align`.
MMFAST_INLINE int64_t even_pieces(int64_t total, int64_t most, int64_t align) {
  const int64_t pieces = max64(ceil_div(total, most), 1);
  return min64(max64(round_up(ceil_div(total, pieces), align), align), most);
}
// The next block of what is left: a small remainder joins the last one, so that 257 keys are 128
// and 129 and not 128, 128 and 1.
MMFAST_INLINE int64_t next_block(int64_t left, int64_t usual, int64_t most) {
  return left <= most ? left : usual;
}

}  // namespace
