// The CPU side of device.cuh: the same names, done by fibers, and checked. Included by device.cuh
// only. What a thread reads and writes itself is in this header, compiled (and instrumented by the
// sanitizers) with the kernel; what the warp or the block does together is behind run.h.
//
// TSan note: GCC inlines memcpy of 16 bytes without instrumentation, so every access here is made
// of explicit integers of at most 8 bytes.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../common/dtype.h"
#include "run.h"

// NOLINTBEGIN: names that kernels use as built-in variables
#define threadIdx (::mmfast::host::state.thread->index)
#define blockIdx (::mmfast::host::state.block)
#define blockDim (::mmfast::host::state.block_dim)
#define gridDim (::mmfast::host::state.grid)
// NOLINTEND

namespace mmfast {

inline float as_float(uint32_t bits) { return bits_to_float(bits); }
inline uint32_t as_bits(float x) { return float_to_bits(x); }

class SharedMemory {
 public:
  template <class T>
  T* take(int64_t count, host::Site site = host::here()) {
    return static_cast<T*>(
        host::take_shared(taken_++, count * int64_t(sizeof(T)), shared_bytes<T>(count), site));
  }

 private:
  int taken_ = 0;
};

inline void sync_threads(host::Site site = host::here()) { host::sync_threads(site); }
inline void sync_warp(host::Site site = host::here()) { host::sync_warp(site); }

template <class T>
T shuffle(T value, int lane, host::Site site = host::here()) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = host::shuffle(bits, lane, site);
  memcpy(&value, &bits, 4);
  return value;
}
template <class T>
T shuffle_xor(T value, int mask, host::Site site = host::here()) {
  return shuffle(value, (int(threadIdx.x) % kWarp) ^ mask, site);
}
inline uint32_t ballot(bool predicate, host::Site site = host::here()) {
  return host::ballot(predicate, site);
}
inline bool any(bool predicate, host::Site site = host::here()) {
  return host::ballot(predicate, site) != 0;
}

namespace host {

template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using type __attribute__((may_alias)) = uint8_t;
};
template <>
struct Word<2> {
  using type __attribute__((may_alias)) = uint16_t;
};
template <>
struct Word<4> {
  using type __attribute__((may_alias)) = uint32_t;
};
template <>
struct Word<8> {
  using type __attribute__((may_alias)) = uint64_t;
};
using Word64 = Word<8>::type;

template <class T>
T load(const T* p) {
  static_assert(is_access<T>);
  T value;
  if constexpr (sizeof(T) == 16) {
    const auto* from = reinterpret_cast<const Word64*>(p);
    const uint64_t words[2] = {from[0], from[1]};
    memcpy(&value, words, 16);
  } else {
    const auto word = *reinterpret_cast<const typename Word<sizeof(T)>::type*>(p);
    memcpy(&value, &word, sizeof(T));
  }
  return value;
}

template <class T>
void store(T* p, const T& value) {
  static_assert(is_access<T>);
  if constexpr (sizeof(T) == 16) {
    uint64_t words[2];
    memcpy(words, &value, 16);
    auto* to = reinterpret_cast<Word64*>(p);
    to[0] = words[0];
    to[1] = words[1];
  } else {
    typename Word<sizeof(T)>::type word;
    memcpy(&word, &value, sizeof(T));
    *reinterpret_cast<typename Word<sizeof(T)>::type*>(p) = word;
  }
}

// An access to shared memory: inside one of the arrays taken, and aligned to its size.
inline void check_shared(const void* p, uint32_t bytes, Access access, const Site& site) {
  const uint64_t offset = uint64_t(static_cast<const unsigned char*>(p) - state.shared);
  if (__builtin_expect(offset >= state.shared_capacity || (offset & (bytes - 1)) != 0 ||
                           (offset & 15) + bytes > state.valid[offset >> 4],
                       0)) {
    bad_shared(p, bytes, access, site);
  }
  if (__builtin_expect(state.counting, 0)) count_access(p, bytes, access, site);
}

inline void check_global(const void* p, uint32_t bytes, Access access, const Site& site) {
  if (__builtin_expect((reinterpret_cast<uintptr_t>(p) & (bytes - 1)) != 0, 0))
    bad_global(p, bytes, access, site);
  if (__builtin_expect(state.counting, 0)) count_access(p, bytes, access, site);
}

// One row of 16 bytes, read by the lane itself: a race or an overrun is reported in its name.
inline Row load_row(const void* p, const Site& site) {
  check_shared(p, 16, Access::kMatrixRow, site);
  const auto* from = static_cast<const Word64*>(p);
  return {from[0], from[1]};
}

}  // namespace host

template <class T>
T load_shared(const T* p, host::Site site = host::here()) {
  host::check_shared(p, sizeof(T), host::Access::kLoadShared, site);
  return host::load(p);
}
template <class T>
void store_shared(T* p, stored<T> value, host::Site site = host::here()) {
  host::check_shared(p, sizeof(T), host::Access::kStoreShared, site);
  host::store(p, value);
}
template <class T>
T load_global(const T* p, host::Site site = host::here()) {
  host::check_global(p, sizeof(T), host::Access::kLoadGlobal, site);
  return host::load(p);
}
template <class T>
void store_global(T* p, stored<T> value, host::Site site = host::here()) {
  host::check_global(p, sizeof(T), host::Access::kStoreGlobal, site);
  host::store(p, value);
}
inline Vec4 load_global_whole(const Vec4* p, host::Site site = host::here()) {
  return load_global(p, site);
}
inline void store_global_whole(Vec4* p, Vec4 value, host::Site site = host::here()) {
  store_global(p, value, site);
}
template <class T>
T load_global_once(const T* p, host::Site site = host::here()) {
  return load_global(p, site);
}

// The source is read now, the destination written at the wait; until then it holds NaNs.
inline void cp_async16(void* shared, const void* global, bool valid,
                       host::Site site = host::here()) {
  host::check_shared(shared, 16, host::Access::kCopyToShared, site);
  uint64_t words[2] = {0, 0};
  if (valid) {
    host::check_global(global, 16, host::Access::kCopyFromGlobal, site);
    const auto* from = static_cast<const host::Word64*>(global);
    words[0] = from[0];
    words[1] = from[1];
  }
  auto* to = static_cast<host::Word64*>(shared);
  to[0] = ~uint64_t(0);
  to[1] = ~uint64_t(0);
  host::begin_copy(shared, words[0], words[1]);
}
inline void cp_async_commit() { host::commit_copies(); }
template <int Groups>
void cp_async_wait() {
  while (const host::Copy* copy = host::next_copy(Groups)) {
    auto* to = static_cast<host::Word64*>(copy->to);
    to[0] = copy->words[0];
    to[1] = copy->words[1];
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, host::Site site = host::here()) {
  host::ldmatrix(r, 4, false, host::load_row(shared_row, site), shared_row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row,
                              host::Site site = host::here()) {
  host::ldmatrix(r, 4, true, host::load_row(shared_row, site), shared_row, site);
}
// The upper half of the lanes gives no addresses.
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row, host::Site site = host::here()) {
  const bool reads = int(threadIdx.x) % kWarp < 16;
  host::ldmatrix(r, 2, false, reads ? host::load_row(shared_row, site) : host::Row{}, shared_row,
                 site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row,
                              host::Site site = host::here()) {
  const bool reads = int(threadIdx.x) % kWarp < 16;
  host::ldmatrix(r, 2, true, reads ? host::load_row(shared_row, site) : host::Row{}, shared_row,
                 site);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  host::Site site = host::here()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  host::MmaOperands operands{c, a, {b0, b1}};
  host::mma(std::is_same_v<T, bf16> ? host::Kind::kMmaBf16 : host::Kind::kMmaF16, operands, site);
}
// Tensor cores ignore the 13 bits that tf32 lacks.
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             host::Site site = host::here()) {
  host::MmaOperands operands{c, a, {b0, b1}};
  host::mma(host::Kind::kMmaTf32, operands, site);
}

namespace host {
// .ftz: subnormal numbers count as zero, going in and coming out.
inline float flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
}  // namespace host

inline float exp2_approx(float x) { return host::flush(exp2f(host::flush(x))); }
inline float log2_approx(float x) { return host::flush(log2f(host::flush(x))); }
inline float rcp_approx(float x) { return host::flush(1.0f / host::flush(x)); }
inline float device_expf(float x) { return expf(x); }
inline float device_tanhf(float x) { return tanhf(x); }
inline float device_erff(float x) { return erff(x); }

// Not one half of a fused multiply-add: the compiler cannot see through the empty statement.
inline float mul_rn(float x, float y) {
  float product = x * y;
#if defined(__x86_64__)
  asm("" : "+x"(product));
#else
  asm("" : "+w"(product));
#endif
  return product;
}

inline uint32_t pack_bf16(float lo, float hi) {
  return uint32_t(float_to_bf16(lo)) | uint32_t(float_to_bf16(hi)) << 16;
}
inline uint32_t pack_f16(float lo, float hi) {
  return uint32_t(float_to_f16(lo)) | uint32_t(float_to_f16(hi)) << 16;
}
inline float f16_bits_to_float(uint16_t bits) { return f16_to_float(bits); }

}  // namespace mmfast
