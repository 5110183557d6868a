// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// The dropout mask is a pure function of (seed, b, h, n, m): every backend drops the same elements.
// Counter = (n, m / 4, low and high word of b * H + h), key = seed; element m takes word m % 4.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define MMFAST_PHILOX_INLINE __host__ __device__ __forceinline__
#else
#define MMFAST_PHILOX_INLINE inline __attribute__((always_inline))
#endif

namespace mmfast {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;

static MMFAST_PHILOX_INLINE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2,
                                              uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
  const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
  c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
  c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
  c1 = uint32_t(p1);
  c3 = uint32_t(p0);
}

}  // namespace mmfast
