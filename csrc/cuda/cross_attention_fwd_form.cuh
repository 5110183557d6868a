// What an instance of the forward of cross_attention is, and how its keys and values come into
// shared memory.
#pragma once
#include "attention_rules.cuh"
#include "cross_attention_fwd.h"
#include "tile.cuh"

namespace mmfast {

// Which rows a block has, of which split of the keys. The hot loop does without, and its registers
// are scarce: the place waits in shared memory.
struct BlockPlace {
  int32_t b, g, part;
  RowTile tile;
  Lengths l;

  static constexpr int VECTORS = 2;

  MMFAST_DEVICE BlockPlace(const FwdArgs& args, int rows) {
    uint32_t block = blockIdx.x;
    int32_t index = int32_t(block % uint32_t(args.tiles.count));
    block /= uint32_t(args.tiles.count);
    part = int32_t(block % uint32_t(args.splits));
    block /= uint32_t(args.splits);
    g = int32_t(block % uint32_t(args.a.rules.G)), b = int32_t(block / uint32_t(args.a.rules.G));
    // Where attention is causal, the tiles with the most keys begin first.
    if (args.a.rules.is_causal) index = args.tiles.count - 1 - index;
    tile = row_tile(args.tiles, index, rows);
    l = lengths(args.a.rules, b);
  }

  // By one thread; a barrier later it can be loaded.
  MMFAST_DEVICE void store(Vec4* shared) const {
    const auto bits = [](int32_t x) { return uint32_t(x); };
    store_shared(shared, Vec4{{bits(b), bits(g), bits(part), bits(tile.head)}});
    store_shared(shared + 1, Vec4{{bits(tile.first), bits(l.kv), bits(l.q), bits(l.shift)}});
  }

  MMFAST_DEVICE BlockPlace(const FwdArgs& args, const Vec4* shared) {
    const Vec4 x = load_shared(shared), y = load_shared(shared + 1);
    b = int32_t(x.x[0]), g = int32_t(x.x[1]), part = int32_t(x.x[2]);
    tile.head = int32_t(x.x[3]), tile.first = int32_t(y.x[0]);
    tile.N = args.tiles.N, tile.heads = args.tiles.heads, tile.packed = args.tiles.packed;
    l = {int32_t(y.x[1]), int32_t(y.x[2]), int32_t(y.x[3])};
  }
};

// GROUPS: of 16 rows, which a warp has. Two read each key and value half as often; their sums fill
// the registers. RING: tiles of keys or values in flight or in use, see `KeyRing`.
template <class T_, int WIDTH_, int GROUPS_, bool FULL_>
struct FwdForm {
  using T = T_;
  static constexpr int WIDTH = WIDTH_, GROUPS = GROUPS_;
  static constexpr bool FULL = FULL_;
  static constexpr int WARPS = 4, THREADS = WARPS * kWarp;
  static constexpr int WARP_ROWS = 16 * GROUPS, ROWS = WARPS * WARP_ROWS;
  static constexpr int KEYS = fwd_keys(int(sizeof(T)), WIDTH);
  static constexpr int RING = WIDTH * int(sizeof(T)) <= 128 ? 4 : 2;
  // Queries stay in registers where those suffice.
  static constexpr bool HELD = !FULL && sizeof(T) == 2 && GROUPS == 1 && WIDTH <= 128;
  static constexpr int MIN_BLOCKS = 2;

  using Queries = Tile<T, ROWS, WIDTH>;
  using Keys = Tile<T, KEYS, WIDTH>;
  static constexpr int SCRATCH = 2 * WARPS;  // integers, to find a span of segments

  static constexpr int64_t shared() {
    return shared_bytes<T>(Queries::ELEMENTS) + shared_bytes<T>(RING * Keys::ELEMENTS) +
           shared_bytes<Vec4>(BlockPlace::VECTORS) + shared_bytes<int32_t>(FULL ? SCRATCH : 0);
  }
};

// One thread's part in copying the tiles of keys, or of values, of one head, one after the other.
// Threads share a row in groups of TEAM neighbours, so that a warp reads pieces of 128 bytes (64
// for odd widths).
template <class F>
struct KeyCopy {
  using T = typename F::T;
  using TILE = typename F::Keys;
  static constexpr int TEAM = TILE::TURNED;
  static constexpr int STEP = F::THREADS / TEAM;  // rows at once
  static constexpr int TURNS = (TILE::ROWS + STEP - 1) / STEP, CHUNKS = TILE::CHUNKS / TEAM;

  const T* from;  // this thread's first chunk of the next tile
  int64_t sn;
  int32_t width;
  bool wide;

  MMFAST_DEVICE KeyCopy(const AttentionTensor& x, int32_t b, int32_t g, int32_t first,
                        int32_t width_)
      : from(row_of<T>(x, b, g, 0) + (int64_t(first) + row()) * x.sn + column()),
        sn(x.sn),
        width(width_),
        wide(x.wide) {}

  static MMFAST_DEVICE int row() { return int(threadIdx.x) / TEAM; }
  static MMFAST_DEVICE int column() { return int(threadIdx.x) % TEAM * TILE::PER_CHUNK; }

  // The next ROWS keys, of which those from `left` on are zeros. Visible after cp_async_wait and a
  // barrier.
  MMFAST_DEVICE void issue(T* tile, int32_t left) {
    if (F::FULL && !wide) {
      const T* first = from - row() * sn - column();
      copy_rows<TILE, F::THREADS>(
          tile, [&](int i) { return i < left ? first + i * sn : nullptr; }, width, false);
    } else if (left >= TILE::ROWS) {
      issue_wide<true>(tile, left);
    } else {
      issue_wide<false>(tile, left);
    }
    from += TILE::ROWS * sn;
  }

  template <bool WHOLE>
  MMFAST_DEVICE void issue_wide(T* tile, int32_t left) const {
    const int own = TILE::at(row(), int(threadIdx.x) % TEAM);
    const T* piece = from;
    MMFAST_UNROLL
    for (int i = 0; i < TURNS; ++i, piece += STEP * sn) {
      if (TILE::ROWS % STEP != 0 && row() + i * STEP >= TILE::ROWS) break;
      const bool there = WHOLE || row() + i * STEP < left;
      MMFAST_UNROLL
      for (int c = 0; c < CHUNKS; ++c) {
        const int further = c * TEAM * TILE::PER_CHUNK;
        cp_async16(tile + TILE::along(own, i * STEP, c * TEAM), piece + further,
                   there && column() + further < width);
      }
    }
  }
};

}  // namespace mmfast
