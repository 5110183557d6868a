// Runs over the elements of a row: whole vectors, and the same code for what is left at the ends,
// so that an element's bits do not depend on where in a row it lies. Optionally results go past
// the caches (non-temporal stores).
#pragma once
#include "rows.h"
#include "vec.h"

namespace {

// Calls f with the storage tag of `dtype`.
template <class F>
MMFAST_INLINE void with_storage(mmfast::DType dtype, const F& f) {
  if (dtype == mmfast::DType::F64)
    f(StoreF64{});
  else
    WithStore<float>::call(dtype, f);
}

template <class T>
MMFAST_INLINE T* row_at(const mmfast::RowOperand& x, int64_t i0, int64_t i1, int64_t c = 0) {
  return static_cast<T*>(x.data) + (i0 * x.s0 + i1 * x.s1 + c * x.sc);
}

// The storage of the compute type itself: scratch rows, sums.
template <class Acc>
struct PlainStore {
  using S = StoreF32;
};
template <>
struct PlainStore<double> {
  using S = StoreF64;
};
template <class Acc>
using Plain = typename PlainStore<Acc>::S;

template <class A, class B>
struct SameStorage {
  static constexpr bool value = false;
};
template <class A>
struct SameStorage<A, A> {
  static constexpr bool value = true;
};

// S::loadv and S::storev
template <class S>
struct VectorOf {
  MMFAST_INLINE Vec<typename S::Acc> get(const typename S::Bits* p) { return S::loadv(p); }
  MMFAST_INLINE void put(typename S::Bits* p, Vec<typename S::Acc> v) { S::storev(p, v); }
};
#if defined(__AVX512F__)
// Rounded to bf16 in the upper halves. NaN is cut off, not rounded: it keeps its upper half, which
// is NaN for every NaN that arithmetic gives and for those that were bf16.
MMFAST_INLINE __m512i rounded_bf16(VFloat v) {
  const VUint u = (VUint)v, rounded = u + (((u >> 16) & 1u) + 0x7fffu);
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  return _mm512_mask_mov_epi32((__m512i)u, number, (__m512i)rounded);
}
// In fewer instructions than g++ 12 makes of the vector extensions.
template <>
struct VectorOf<StoreBF16> {
  MMFAST_INLINE VFloat get(const uint16_t* p) {
    __m256i half;
    memcpy(&half, p, sizeof half);
    return (VFloat)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16);
  }
  MMFAST_INLINE void put(uint16_t* p, VFloat v) {
#if defined(__AVX512BF16__)
    const __m256bh words = _mm512_cvtneps_pbh((__m512)v);
#else
    const __m512i bits = rounded_bf16(v);
    const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29,
                                           27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512i words = _mm512_maskz_permutexvar_epi16(0xffff, upper, bits);
#endif
    memcpy(p, &words, 32);
  }
};
#endif

#if defined(__AVX512F__)
MMFAST_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1u); }
#endif

// The first n elements, 0 < n < lanes; the other lanes are 0. Nothing past them is touched.
template <class S>
MMFAST_INLINE Vec<typename S::Acc> load_part(const typename S::Bits* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename S::Bits) == 4) {
    return (VFloat)_mm512_maskz_loadu_ps(first_lanes(n), p);
  } else if constexpr (sizeof(typename S::Bits) == 8) {
    return (VDouble)_mm512_maskz_loadu_pd(__mmask8(first_lanes(n)), p);
  } else {
    typename S::Bits part[lanes<typename S::Acc>()];
    const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(n), p);
    memcpy(part, &bits, sizeof part);
    return VectorOf<S>::get(part);
  }
#else
  typename S::Bits part[lanes<typename S::Acc>()] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return VectorOf<S>::get(part);
#endif
}
template <class S>
MMFAST_INLINE void store_part(typename S::Bits* p, Vec<typename S::Acc> v, int n) {
  typename S::Bits part[lanes<typename S::Acc>()];
  VectorOf<S>::put(part, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(typename S::Bits) == 2) {
    __m256i bits;
    memcpy(&bits, part, sizeof bits);
    _mm256_mask_storeu_epi16(p, first_lanes(n), bits);
  } else {
    __m512i bits;
    memcpy(&bits, part, sizeof bits);
    if constexpr (sizeof(typename S::Bits) == 4)
      _mm512_mask_storeu_epi32(p, first_lanes(n), bits);
    else
      _mm512_mask_storeu_epi64(p, __mmask8(first_lanes(n)), bits);
  }
#else
  for (int i = 0; i < n; ++i) p[i] = part[i];
#endif
}

// Non-temporal; p is aligned to the vector in storage.
template <class S>
MMFAST_INLINE void stream(typename S::Bits* p, Vec<typename S::Acc> v) {
#if defined(__AVX2__)
  typename S::Bits part[lanes<typename S::Acc>()];
  VectorOf<S>::put(part, v);
  if constexpr (sizeof part == 16) {
    __m128i bits;
    memcpy(&bits, part, sizeof bits);
    _mm_stream_si128((__m128i*)p, bits);
  } else if constexpr (sizeof part == 32) {
    __m256i bits;
    memcpy(&bits, part, sizeof bits);
    _mm256_stream_si256((__m256i*)p, bits);
  } else {
#if defined(__AVX512F__)
    __m512i bits;
    memcpy(&bits, part, sizeof bits);
    _mm512_stream_si512((__m512i*)p, bits);
#endif
  }
#else
  VectorOf<S>::put(p, v);
#endif
}
// After the last streamed store of a task: other threads see the results in order.
MMFAST_INLINE void end_streaming(bool streamed) {
#if defined(__AVX2__)
  if (streamed) _mm_sfence();
#endif
  (void)streamed;
}

// What each_vector's callee is given: how many elements this step has.
struct Whole {
  bool streamed;
  template <class S>
  MMFAST_MEMBER Vec<typename S::Acc> load(const typename S::Bits* p) const {
    return VectorOf<S>::get(p);
  }
  template <class S>
  MMFAST_MEMBER void store(typename S::Bits* p, Vec<typename S::Acc> v) const {
    if (streamed)
      stream<S>(p, v);
    else
      VectorOf<S>::put(p, v);
  }
  // Into scratch: stays in the caches.
  template <class S>
  MMFAST_MEMBER void keep(typename S::Bits* p, Vec<typename S::Acc> v) const {
    VectorOf<S>::put(p, v);
  }
};
struct Part {
  int n;
  template <class S>
  MMFAST_MEMBER Vec<typename S::Acc> load(const typename S::Bits* p) const {
    return load_part<S>(p, n);
  }
  template <class S>
  MMFAST_MEMBER void store(typename S::Bits* p, Vec<typename S::Acc> v) const {
    store_part<S>(p, v, n);
  }
  template <class S>
  MMFAST_MEMBER void keep(typename S::Bits* p, Vec<typename S::Acc> v) const {
    store_part<S>(p, v, n);
  }
};

#if defined(__AVX512F__)
// Two vectors of bf16 as one of 32 elements: the even ones are a shift away from floats and the odd
// ones a mask, and nothing is shuffled. f runs for the even elements and then for the odd ones,
// which write what both have. 4-byte storage beside them is split and joined by permutes.
struct Halves {
  __m512i kept[8];
  int next;
};
template <bool ODD>
struct PairHalf {
  Halves& halves;
  bool streamed;
  template <class S>
  MMFAST_MEMBER VFloat load(const typename S::Bits* p) const {
    if constexpr (sizeof(typename S::Bits) == 4) {
      const __m512i first =
          _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
      const __m512i which = ODD ? (__m512i)((VInt)first + 1) : first;
      return (VFloat)_mm512_permutex2var_ps((__m512)::load(p), which, (__m512)::load(p + 16));
    } else {
      static_assert(SameStorage<S, StoreBF16>::value, "pairs of bf16 only");
      VUint words;
      memcpy(&words, p, sizeof words);
      return ODD ? (VFloat)(words & 0xffff0000u) : (VFloat)(words << 16);
    }
  }
  template <class S>
  MMFAST_MEMBER void store(typename S::Bits* p, VFloat v) const {
    put<S>(p, v, streamed);
  }
  template <class S>
  MMFAST_MEMBER void keep(typename S::Bits* p, VFloat v) const {
    put<S>(p, v, false);
  }

 private:
  template <class S>
  MMFAST_MEMBER void put(typename S::Bits* p, VFloat v, bool past) const {
    __m512i& even = halves.kept[halves.next++];
    if constexpr (sizeof(typename S::Bits) == 4) {
      if (!ODD) {
        even = (__m512i)v;
        return;
      }
      const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      const __m512i high = (__m512i)((VInt)low + 8);
      write(p, _mm512_permutex2var_epi32(even, low, (__m512i)v), past);
      write(p + 16, _mm512_permutex2var_epi32(even, high, (__m512i)v), past);
    } else {
      static_assert(SameStorage<S, StoreBF16>::value, "pairs of bf16 only");
      const __m512i upper = rounded_bf16(v);
      if (!ODD)
        even = (__m512i)((VUint)upper >> 16);
      else
        write(p, _mm512_mask_blend_epi16(0xaaaaaaaau, even, upper), past);
    }
  }
  static MMFAST_MEMBER void write(void* p, __m512i v, bool past) {
    if (past)
      _mm512_stream_si512((__m512i*)p, v);
    else
      memcpy(p, &v, sizeof v);
  }
};
#endif

// Into scratch, which stays in the caches also where results do not.
template <class At, class Acc>
MMFAST_INLINE void keep(At at, Acc* p, Vec<Acc> v) {
  at.template keep<Plain<Acc>>(p, v);
}

// Calls f(at, i) for elements i, i+1, ... of [0, count): `at.load<S>(p + i)` and
// `at.store<S>(p + i, v)` read and write as many as the step has. Lanes past them load as 0.
// With `result`, stores of whole vectors go past the caches; every result stored by f must then be
// aligned as `result` is (same_alignment).
template <class S, bool PAIRS, class F>
MMFAST_INLINE void each_step(int64_t count, const void* result, const F& f) {
  constexpr int L = lanes<typename S::Acc>();
  constexpr uintptr_t kAlign = L * sizeof(typename S::Bits);
  int64_t i = 0;
  bool streamed = false;
  if (result != nullptr) {
    const uintptr_t past = uintptr_t(result) % kAlign;
    streamed = past % sizeof(typename S::Bits) == 0;
    i = past == 0 || !streamed ? 0
                               : min64(int64_t((kAlign - past) / sizeof(typename S::Bits)), count);
    if (i > 0) f(Part{int(i)}, int64_t(0));
  }
#if defined(__AVX512F__)
  if constexpr (PAIRS && SameStorage<S, StoreBF16>::value) {
    if (streamed && (uintptr_t(result) + uintptr_t(i) * 2) % 64 != 0 && i + L <= count) {
      f(Whole{true}, i);
      i += L;
    }
    for (; i + 2 * L <= count; i += 2 * L) {
      Halves halves;
      halves.next = 0;
      f(PairHalf<false>{halves, streamed}, i);
      halves.next = 0;
      f(PairHalf<true>{halves, streamed}, i);
    }
  }
#endif
  for (; i + L <= count; i += L) f(Whole{streamed}, i);
  if (i < count) f(Part{int(count - i)}, i);
}
template <class S, class F>
MMFAST_INLINE void each_vector(int64_t count, const void* result, const F& f) {
  each_step<S, false>(count, result, f);
}
template <class S, class F>
MMFAST_INLINE void each_vector(int64_t count, const F& f) {
  each_step<S, false>(count, nullptr, f);
}
// The same, faster for bf16. f must reach memory by nothing but `at` and have at most 8 stores, in
// the same order each time: a step's elements need not be neighbours.
template <class S, class F>
MMFAST_INLINE void each_element(int64_t count, const void* result, const F& f) {
  each_step<S, true>(count, result, f);
}
MMFAST_INLINE bool same_alignment(const void* a, const void* b) {
  return (uintptr_t(a) ^ uintptr_t(b)) % kVectorBytes == 0;
}

// Calls f(i0, i1, c0, count) for the rows, or the pieces of rows, of one task.
template <class F>
MMFAST_INLINE void each_row(const mmfast::RowShape& shape, const mmfast::RowTasks& tasks,
                            int64_t task, const F& f) {
  const int64_t c0 = task % tasks.column_tasks * tasks.columns_each;
  const int64_t count = min64(tasks.columns_each, shape.columns - c0);
  const int64_t from = task / tasks.column_tasks * tasks.rows_each;
  const int64_t to = min64(from + tasks.rows_each, shape.rows());
  int64_t i0 = from / shape.n1, i1 = from % shape.n1;
  for (int64_t row = from; row < to; ++row) {
    f(i0, i1, c0, count);
    if (++i1 == shape.n1) i1 = 0, ++i0;
  }
}

// ---- sums over tasks --------------------------------------------------------------------------

// The sum of the lanes, in a fixed order, by halves.
MMFAST_INLINE float lane_sum(VFloat v) {
#if defined(__AVX__)
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0),
                                     _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1));
#else
  const __m256 eight = (__m256)v;
#endif
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
MMFAST_INLINE double lane_sum(VDouble v) {
  double sum = v[0];
  for (int i = 1; i < lanes<double>(); ++i) sum += v[i];
  return sum;
}

// A sum as if in twice the precision: what rounding loses is summed beside it.
template <class Acc>
struct Compensated {
  Vec<Acc> sum = {}, lost = {};
  MMFAST_MEMBER void add(Vec<Acc> x) {
    const Vec<Acc> next = sum + x, back = next - sum;
    lost += (sum - (next - back)) + (x - back);
    sum = next;
  }
  MMFAST_MEMBER Vec<Acc> total() const {
    return lost == lost ? sum + lost : sum;  // inf - inf is no lost part
  }
};

// Over the slots that tasks left, `stride` apart.
template <class Acc, class At>
MMFAST_INLINE Vec<Acc> sum_of_slots(const Acc* p, int64_t slots, int64_t stride, At at) {
  Compensated<Acc> total;
  for (int64_t i = 0; i < slots; ++i) total.add(at.template load<Plain<Acc>>(p + i * stride));
  return total.total();
}

// f(at, c, sum) for the columns c of [0, count): sum over the slots, in their order and compensated
// (as if in twice the precision), of parts[slot * stride + c].
template <class T, class F>
MMFAST_INLINE void sum_slots(const T* parts, int64_t slots, int64_t stride, int64_t count,
                             const F& f) {
  each_vector<Plain<T>>(count, [&](auto at, int64_t c) MMFAST_LAMBDA {
    f(at, c, sum_of_slots(parts + c, slots, stride, at));
  });
}

}  // namespace
