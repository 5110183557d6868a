// Storage dtypes and their scalar conversions. Plain C++: no processor extension is assumed.
#pragma once
#include <stdint.h>
#include <string.h>

namespace mmfast {

enum class DType : int32_t { F32 = 0, BF16 = 1, F16 = 2, F64 = 3 };

static inline int64_t dtype_bytes(DType t) { return t == DType::F64 ? 8 : t == DType::F32 ? 4 : 2; }

static inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

// Round to nearest even; every NaN becomes the quiet NaN 0x7fc0.
static inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fc0) : uint16_t(rounded);
}

static inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u)
    return bits_to_float(sign | 0x7f800000u | (magnitude & 0x007fffffu));
  // Multiplying by 2^112 rebiases the exponent and normalises half denormals exactly.
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);
  return bits_to_float(sign | float_to_bits(scaled));
}

static inline uint16_t float_to_f16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (a < 0x38800000u) {
    // Adding 0.5 lines the half-denormal bits up with the end of the mantissa, rounded to even.
    const float shifted = bits_to_float(a) + 0.5f;
    return uint16_t(sign | uint16_t(float_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t odd = (a >> 13) & 1u;
  return uint16_t(sign | uint16_t((a - 0x38000000u + 0xfffu + odd) >> 13));
}

}  // namespace mmfast
