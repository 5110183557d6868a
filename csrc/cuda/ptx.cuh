// The GPU side of device.cuh: intrinsics and PTX. The strings of this file are the one thing that
// the host run cannot execute; nvcc and ptxas check their syntax, and fragment layouts are checked
// against CuTe's on the host side (tests/test_cuda_host_layouts.py).
//
// ldmatrix, cp.async and the waits clobber memory, so that the compiler keeps them in order with
// plain loads and stores of the same shared memory; ptxas, which knows them, schedules them freely.
#pragma once
#include <stdint.h>

namespace mmfast {

MMFAST_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
MMFAST_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

MMFAST_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// The block's dynamic shared memory, handed out from its beginning.
class SharedMemory {
 public:
  template <class T>
  MMFAST_DEVICE T* take(int64_t count) {
    extern __shared__ __align__(kSharedAlignment) unsigned char mmfast_dynamic_shared[];
    T* p = reinterpret_cast<T*>(mmfast_dynamic_shared + used_);
    used_ += uint32_t(shared_bytes<T>(count));
    return p;
  }

 private:
  uint32_t used_ = 0;
};

MMFAST_DEVICE void sync_threads() { __syncthreads(); }
MMFAST_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
MMFAST_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
MMFAST_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
MMFAST_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
MMFAST_DEVICE bool any(bool predicate) { return __any_sync(0xffffffffu, predicate) != 0; }

// The built-in type whose load and store is one instruction of this many bytes.
template <int Bytes>
struct Access;
template <>
struct Access<1> {
  using type = uint8_t;
};
template <>
struct Access<2> {
  using type = uint16_t;
};
template <>
struct Access<4> {
  using type = uint32_t;
};
template <>
struct Access<8> {
  using type = uint2;
};
template <>
struct Access<16> {
  using type = uint4;
};
template <class T>
using access_type = typename Access<sizeof(T)>::type;

template <class To, class From>
MMFAST_DEVICE To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
MMFAST_DEVICE T load_shared(const T* p) {
  static_assert(is_access<T>);
  return same_bits<T>(*reinterpret_cast<const access_type<T>*>(p));
}
template <class T>
MMFAST_DEVICE void store_shared(T* p, stored<T> value) {
  static_assert(is_access<T>);
  *reinterpret_cast<access_type<T>*>(p) = same_bits<access_type<T>>(value);
}
template <class T>
MMFAST_DEVICE T load_global(const T* p) {
  static_assert(is_access<T>);
  return same_bits<T>(*reinterpret_cast<const access_type<T>*>(p));
}
template <class T>
MMFAST_DEVICE void store_global(T* p, stored<T> value) {
  static_assert(is_access<T>);
  *reinterpret_cast<access_type<T>*>(p) = same_bits<access_type<T>>(value);
}
// 16 bytes in one instruction. The compiler takes a plain access apart where another branch reads
// or writes the same elements one by one.
MMFAST_DEVICE Vec4 load_global_whole(const Vec4* p) {
  return same_bits<Vec4>(__ldca(reinterpret_cast<const uint4*>(p)));
}
MMFAST_DEVICE void store_global_whole(Vec4* p, Vec4 value) {
  __stwb(reinterpret_cast<uint4*>(p), same_bits<uint4>(value));
}
// Streaming: what is read once is the first to leave the caches.
template <class T>
MMFAST_DEVICE T load_global_once(const T* p) {
  static_assert(is_access<T>);
  return same_bits<T>(__ldcs(reinterpret_cast<const access_type<T>*>(p)));
}

// 16 bytes past the L1 cache; a source size of 0 fills with zeros and reads nothing.
MMFAST_DEVICE void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}
MMFAST_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Groups>
MMFAST_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

MMFAST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
MMFAST_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
MMFAST_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}
MMFAST_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}

// c += a b, with a [16, 16] by rows, b [16, 8] by columns, c [16, 8] in float.
template <class T>
MMFAST_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, f16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// c += a b, with a [16, 8] by rows and b [8, 8] by columns in tf32: the low 13 bits are not read.
MMFAST_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

MMFAST_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MMFAST_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MMFAST_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Never part of a fused multiply-add: what is subtracted from such products must be made of the
// same.
MMFAST_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
MMFAST_DEVICE float device_expf(float x) { return expf(x); }
MMFAST_DEVICE float device_tanhf(float x) { return tanhf(x); }
MMFAST_DEVICE float device_erff(float x) { return erff(x); }

MMFAST_DEVICE uint32_t pack_bf16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
MMFAST_DEVICE uint32_t pack_f16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
MMFAST_DEVICE float f16_bits_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

}  // namespace mmfast
