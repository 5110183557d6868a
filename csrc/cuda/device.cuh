// What kernels are written in. nvcc finds the GPU's instructions behind these names (ptx.cuh),
// every other compiler finds fibers that do the same on a CPU (../host/device.h), where each access
// and each collective is checked. Kernels know of no other difference between the two.
//
// Rules: blocks are one-dimensional and a multiple of 32 threads; shared memory is dynamic and
// comes from SharedMemory; it is read and written through load_shared and store_shared; every lane
// of a warp reaches every collective (shuffle, ballot, ldmatrix, mma, sync_warp), every thread of a
// block every sync_threads.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#ifdef __CUDACC__
#define MMFAST_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)
#define MMFAST_PARAM(...) const __grid_constant__ __VA_ARGS__
#define MMFAST_DEVICE __device__ __forceinline__
#define MMFAST_HD __host__ __device__ inline
#define MMFAST_UNROLL _Pragma("unroll")
#define MMFAST_NO_UNROLL _Pragma("unroll 1")
#else
#define MMFAST_KERNEL(threads, min_blocks) inline void
#define MMFAST_PARAM(...) const __VA_ARGS__&
#define MMFAST_DEVICE inline
#define MMFAST_HD inline
#define MMFAST_UNROLL
#define MMFAST_NO_UNROLL
#endif

namespace mmfast {

constexpr int kWarp = 32;

// Storage dtypes: 16 bits each, turned into float by to_float and from it by from_float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2);

// What one access of up to 16 bytes loads and stores.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT) Vec {
  T x[COUNT];
};
using Vec2 = Vec<uint32_t, 2>;
using Vec4 = Vec<uint32_t, 4>;

// What one array of shared memory takes of the launch's size: arrays begin at multiples of this.
constexpr int kSharedAlignment = 128;

template <class T>
MMFAST_HD constexpr int64_t shared_bytes(int64_t count) {
  return (count * int64_t(sizeof(T)) + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
}

// Sizes that one access may have; its address is a multiple of the size.
template <class T>
constexpr bool is_access =
    std::is_trivially_copyable_v<T> &&
    (sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

// The value of a store has the type of what the pointer points to.
template <class T>
using stored = std::common_type_t<T>;

}  // namespace mmfast

#ifdef __CUDACC__
#include "ptx.cuh"
#else
#include "../host/device.h"
#endif

namespace mmfast {

MMFAST_DEVICE int lane_id() { return int(threadIdx.x) % kWarp; }
MMFAST_DEVICE int warp_id() { return int(threadIdx.x) / kWarp; }

// bf16 is the upper half of a float, so widening needs no instruction of its own.
template <class T>
MMFAST_DEVICE float lo2(uint32_t pair) {
  if constexpr (std::is_same_v<T, bf16>) {
    return as_float(pair << 16);
  } else {
    static_assert(std::is_same_v<T, f16>);
    return f16_bits_to_float(uint16_t(pair & 0xffffu));
  }
}

template <class T>
MMFAST_DEVICE float hi2(uint32_t pair) {
  if constexpr (std::is_same_v<T, bf16>) {
    return as_float(pair & 0xffff0000u);
  } else {
    static_assert(std::is_same_v<T, f16>);
    return f16_bits_to_float(uint16_t(pair >> 16));
  }
}

// Round to nearest, ties to even.
template <class T>
MMFAST_DEVICE uint32_t pack2(float lo, float hi) {
  if constexpr (std::is_same_v<T, bf16>) {
    return pack_bf16(lo, hi);
  } else {
    static_assert(std::is_same_v<T, f16>);
    return pack_f16(lo, hi);
  }
}

template <class T>
MMFAST_DEVICE float to_float(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return lo2<T>(x.bits);
  }
}

template <class T>
MMFAST_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return T{uint16_t(pack2<T>(x, 0.0f) & 0xffffu)};
  }
}

}  // namespace mmfast
