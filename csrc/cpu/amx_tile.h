// The four tile operations the AMX kernels use, and, for machines without AMX, the same written
// out: the emulated build runs the very kernels in tests anywhere AVX-512 bf16 is.
// Tile shapes: A 16 rows x 16 pairs, B 16 pairs x 16 columns, C 16 x 16 floats.
#pragma once
#include "vec.h"

namespace {

#if defined(__AMX_BF16__)

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The tile shape is state of the thread. It is loaded for each product: 20 cycles against the
// thousands of a product, and nothing to restore for others who use tiles on this thread.
struct TileScope {
  TileScope() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.rows[i] = 16, config.row_bytes[i] = 64;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

// Macros, since the compiler wants the tile's number as a literal.
#define MMFAST_TILE_ZERO(T) _tile_zero(T)
#define MMFAST_TILE_LOAD(T, p, stride_bytes) _tile_loadd(T, p, stride_bytes)
#define MMFAST_TILE_STORE(T, p, stride_bytes) _tile_stored(T, p, stride_bytes)
#define MMFAST_TILE_DOT(C, A, B) _tile_dpbf16ps(C, A, B)

#else

static thread_local uint32_t emulated_tiles[8][16][16];

struct TileScope {
  TileScope() {
    memset(emulated_tiles, 0xff, sizeof emulated_tiles);
  }  // NaN: loads must come first
  ~TileScope() { memset(emulated_tiles, 0xff, sizeof emulated_tiles); }
};

MMFAST_INLINE void emulate_load(int t, const void* p, int64_t stride_bytes) {
  for (int r = 0; r < 16; ++r)
    memcpy(emulated_tiles[t][r], static_cast<const char*>(p) + r * stride_bytes, 64);
}
MMFAST_INLINE void emulate_store(int t, void* p, int64_t stride_bytes) {
  for (int r = 0; r < 16; ++r)
    memcpy(static_cast<char*>(p) + r * stride_bytes, emulated_tiles[t][r], 64);
}
MMFAST_INLINE void emulate_dot(int t, int left, int right) {
  for (int r = 0; r < 16; ++r) {
    VFloat sum = (VFloat)load(emulated_tiles[t][r]);
    for (int k = 0; k < 16; ++k) {
      const uint32_t a = emulated_tiles[left][r][k];
      const VUint b = load(emulated_tiles[right][k]);
      sum += mmfast::bits_to_float(a << 16) * (VFloat)(b << 16);
      sum += mmfast::bits_to_float(a & 0xffff0000u) * (VFloat)(b & 0xffff0000u);
    }
    store(emulated_tiles[t][r], (VUint)sum);
  }
}

#define MMFAST_TILE_ZERO(T) memset(emulated_tiles[T], 0, sizeof emulated_tiles[T])
#define MMFAST_TILE_LOAD(T, p, stride_bytes) emulate_load(T, p, stride_bytes)
#define MMFAST_TILE_STORE(T, p, stride_bytes) emulate_store(T, p, stride_bytes)
#define MMFAST_TILE_DOT(C, A, B) emulate_dot(C, A, B)

#endif

}  // namespace
