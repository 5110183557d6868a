// cross_attention, backward, the pass over keys: dk and dv.
//
// A block holds a tile of keys, K and V in shared memory, and goes over the rows of all heads that
// share the key head, a tile of them at a time: while it computes one the next is on its way.
// Scores are transposed, rows of the product are keys, so that weights and their gradients go from
// sums straight into the next product. A warp has 16 or 32 keys and all rows of a tile.
//
// The widest heads have dv made by one block and dk by another: a warp's registers hold one of
// them.
#pragma once
#include "cross_attention_bwd.h"
#include "cross_attention_products.cuh"
#include "cross_attention_tile_rows.cuh"
#include "launch.cuh"
#include "segment_span.cuh"

namespace mmfast {

template <class T_, int WIDTH_, bool FULL_>
struct KeysPass {
  using T = T_;
  static constexpr int WIDTH = WIDTH_;
  static constexpr bool FULL = FULL_, WORDS = sizeof(T) == 4;
  static constexpr bool APART = WIDTH > 128;  // dk and dv by blocks of their own
  static constexpr int WARPS = WORDS && WIDTH > 128 ? 2 : 4, THREADS = WARPS * 32;
  static constexpr int FRAGMENTS = !WORDS && WIDTH <= 64 && !FULL ? 2 : 1;  // of 16 keys, a warp
  static constexpr int KEYS = WARPS * FRAGMENTS * 16;
  static constexpr int ROWS = WIDTH > 128 || (WORDS && WIDTH > 64) ? 16 : 32;
  static constexpr int STAGES = WORDS && WIDTH > 128 ? 1 : 2;
  static constexpr int MIN_BLOCKS = 2;
  static constexpr int BLOCKS = ROWS / 8;  // of 8 rows
  static constexpr int COLUMNS = WIDTH / 8;
  static constexpr int SLOTS = 3;  // tiles whose rows are known: this one and the next two

  using KeyTile = Tile<T, KEYS, WIDTH>;
  using RowsTile = Tile<T, ROWS, WIDTH>;
  using Rows = TileRows<ROWS, FULL, FULL>;

  static constexpr int64_t shared_size() {
    return 2 * shared_bytes<T>(KeyTile::ELEMENTS) +
           2 * shared_bytes<T>(STAGES * RowsTile::ELEMENTS) + Rows::bytes(SLOTS) +
           (FULL ? shared_bytes<int32_t>(2 * WARPS) : 0);
  }
};

// Which rows a block goes over: tiles [begin, end), of which a head has `each`, from row `low` on.
struct RowWalk {
  int32_t low = 0, each = 0, begin = 0, end = 0;
  int32_t full = 0;  // rows from here on see all keys of the tile, by length and causality
  bool packed = false;

  MMFAST_DEVICE RowTile tile(const QueryTiles& tiles, int32_t i, int32_t rows) const {
    if (packed) return row_tile(tiles, i, rows);
    RowTile t;
    t.N = tiles.N, t.heads = tiles.heads;
    t.head = i / each;
    t.first = low + (i - t.head * each) * rows;
    return t;
  }
};

template <class C>
MMFAST_DEVICE RowWalk walk_over_rows(const BackwardPass& p, const Lengths& l, int32_t b,
                                     int32_t first, int32_t part, int32_t* scratch) {
  const AttentionRules& r = p.a.rules;
  KeyRange range = query_range(r, l, first, C::KEYS, C::ROWS);
  if constexpr (C::FULL) {
    if (r.kv_segments != nullptr) {
      Span wanted = {kGreatest, kLeast};
      for (int32_t i = int32_t(threadIdx.x); i < C::KEYS && first + i < l.kv; i += C::THREADS) {
        const int32_t s = key_segment(r, b, first + i);
        wanted.least = s < wanted.least ? s : wanted.least;
        wanted.greatest = s > wanted.greatest ? s : wanted.greatest;
      }
      wanted = span_of_block<C::WARPS>(wanted, scratch);
      if (r.segments_at_most) wanted.greatest = kGreatest;
      const Span found = positions_of_segments<C::WARPS>(r.q_segments + int64_t(b) * r.N,
                                                         range.high, wanted, scratch);
      if (found.least > found.greatest) range.low = range.high = 0;
      if (found.least > range.low && found.least < range.high)
        range.low = found.least / C::ROWS * C::ROWS;
      if (found.greatest + 1 < range.high) range.high = found.greatest + 1;
    }
  }
  RowWalk w;
  w.low = range.low, w.full = range.full, w.packed = p.row_tiles.packed;
  const int32_t rows = range.high > range.low ? range.high - range.low : 0;
  w.each = (rows + C::ROWS - 1) / C::ROWS;
  const int32_t count = !w.packed ? r.heads * w.each : rows > 0 ? p.row_tiles.count : 0;
  const int32_t chunk = (count + p.splits - 1) / p.splits;
  w.begin = part * chunk < count ? part * chunk : count;
  w.end = count - w.begin < chunk ? count : w.begin + chunk;
  return w;
}

// One bit for each of a warp's sums, in their order.
template <class C>
struct KeyBits {
  static constexpr int WORDS = (C::FRAGMENTS * C::BLOCKS * 4 + 31) / 32;
  uint32_t x[WORDS] = {};

  MMFAST_DEVICE void set(int i, int j, uint32_t four) {
    const int at = (i * C::BLOCKS + j) * 4;
    x[at / 32] |= four << (at % 32);
  }
  MMFAST_DEVICE bool get(int i, int j, int e) const {
    const int at = (i * C::BLOCKS + j) * 4 + e;
    return (x[at / 32] >> (at % 32) & 1) != 0;
  }
};

// Writes a warp's sums of keys `first` and on, to the gradient or among the partial sums.
template <class C>
MMFAST_DEVICE void store_keys(const float (&sums)[C::FRAGMENTS][C::COLUMNS][4],
                              const AttentionTensor& result, float* partial, const BackwardPass& p,
                              const Lengths& l, int32_t b, int32_t g, int32_t first, int32_t part,
                              int width, float factor) {
  using T = typename C::T;
  const AttentionRules& r = p.a.rules;
  const int32_t start = start_of(r.kv_starts, b), places = key_places(r, l);
  MMFAST_UNROLL
  for (int i = 0; i < C::FRAGMENTS; ++i) {
    const int32_t m = first + 16 * i + (lane_id() >> 2);
    const bool there[2] = {m < l.kv, m + 8 < l.kv};
    if (p.splits > 1) {
      const int64_t row = ((int64_t(part) * r.B + b) * r.G + g) * r.M + m;
      float* const to[2] = {m < r.M ? partial + row * width : nullptr,
                            m + 8 < r.M ? partial + (row + 8) * width : nullptr};
      store_sums(sums[i], to, there, width, width % 2 == 0, factor);
    } else {
      T* const to[2] = {m < places ? row_of<T>(result, b, g, start + m) : nullptr,
                        m + 8 < places ? row_of<T>(result, b, g, start + m + 8) : nullptr};
      store_sums(sums[i], to, there, width, result.wide, factor);
    }
  }
}

template <class C, bool DK, bool DV>
MMFAST_DEVICE void make_dk_dv(const BackwardPass& p, int32_t b, int32_t g, int32_t first,
                              int32_t part) {
  using T = typename C::T;
  using KeyTile = typename C::KeyTile;
  using RowsTile = typename C::RowsTile;
  constexpr int F = C::FRAGMENTS;
  const AttentionArgs& a = p.a;
  const AttentionRules& r = a.rules;
  SharedMemory shared;
  T* k_tile = shared.take<T>(KeyTile::ELEMENTS);
  T* v_tile = shared.take<T>(KeyTile::ELEMENTS);
  T* q_tiles = shared.take<T>(C::STAGES * RowsTile::ELEMENTS);
  T* dout_tiles = shared.take<T>(C::STAGES * RowsTile::ELEMENTS);
  typename C::Rows rows;
  rows.take(shared, C::SLOTS);
  int32_t* scratch = nullptr;
  if constexpr (C::FULL) scratch = shared.take<int32_t>(2 * C::WARPS);

  const Lengths l = lengths(r, b);
  const bool values = !C::FULL || a.v.data != nullptr;
  const bool sparse = C::FULL && is_sparse(r);
  const RowWalk walk = walk_over_rows<C>(p, l, b, first, part, scratch);
  const int count = walk.end - walk.begin, thread = int(threadIdx.x);
  const int lane = lane_id(), t = lane & 3, g8 = lane >> 2, own = warp_id() * F * 16;

  // Thread i < ROWS finds row i of a tile, two tiles before it is needed.
  const auto find = [&](int j) {
    return find_row(r, l, walk.tile(p.row_tiles, walk.begin + j, C::ROWS), thread, b, g);
  };
  const auto put = [&](int j, const RowLoads& loads) {
    rows.put(j % C::SLOTS * C::ROWS + thread,
             facts_of_row(a, find(j), loads, b, start_of(r.q_starts, b)));
  };
  const auto copy_tile = [&](int j) {
    const int slot = j % C::SLOTS * C::ROWS, stage = j % C::STAGES * RowsTile::ELEMENTS;
    copy_rows<RowsTile, C::THREADS>(
        q_tiles + stage,
        [&](int i) {
          const int64_t at = load_shared(rows.q + slot + i);
          return at < 0 ? nullptr : static_cast<const T*>(a.q.data) + at;
        },
        a.D, a.q.wide);
    if (values)
      copy_rows<RowsTile, C::THREADS>(
          dout_tiles + stage,
          [&](int i) {
            const int64_t at = load_shared(rows.dout + slot + i);
            return at < 0 ? nullptr : static_cast<const T*>(a.dout.data) + at;
          },
          a.Dv, a.dout.wide);
  };

  float dk[DK ? F : 1][DK ? C::COLUMNS : 1][4] = {};
  float dv[DV ? F : 1][DV ? C::COLUMNS : 1][4] = {};
  int32_t segments[F][2] = {};
  if constexpr (C::FULL) {
    MMFAST_UNROLL
    for (int i = 0; i < F; ++i) {
      MMFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int32_t m = first + own + 16 * i + 8 * half + g8;
        if (m < l.kv) segments[i][half] = key_segment(r, b, m);
      }
    }
  }

  if (count > 0) {
    if (thread < C::ROWS) {
      put(0, load_row(a, find(0), b));
      if (count > 1) put(1, load_row(a, find(1), b));
    }
    const int32_t start = start_of(r.kv_starts, b) + first;
    const auto key_row = [&](const AttentionTensor& x, int i) {
      return first + i < l.kv ? row_of<const T>(x, b, g, start + i) : nullptr;
    };
    copy_rows<KeyTile, C::THREADS>(k_tile, [&](int i) { return key_row(a.k, i); }, a.D, a.k.wide);
    if (DK && values)
      copy_rows<KeyTile, C::THREADS>(
          v_tile, [&](int i) { return key_row(a.v, i); }, a.Dv, a.v.wide);
    sync_threads();
    if (C::STAGES == 2) copy_tile(0);
    cp_async_commit();
  }
  MMFAST_NO_UNROLL
  for (int j = 0; j < count; ++j) {
    if (C::STAGES == 1) {
      if (j > 0) sync_threads();
      copy_tile(j);
      cp_async_commit();
    }
    cp_async_wait<0>();
    sync_threads();
    if (C::STAGES == 2 && j + 1 < count) {
      copy_tile(j + 1);
      cp_async_commit();
    }
    const bool ahead = j + 2 < count && thread < C::ROWS;
    RowLoads next;
    if (ahead) next = load_row(a, find(j + 2), b);

    const T* q_tile = q_tiles + j % C::STAGES * RowsTile::ELEMENTS;
    const T* dout_tile = dout_tiles + j % C::STAGES * RowsTile::ELEMENTS;
    const int slot = j % C::SLOTS * C::ROWS;
    float s[F][C::BLOCKS][4] = {};
    multiply_rows<KeyTile, RowsTile>(s, k_tile, own, q_tile);

    // Weights from scores.
    const RowTile tile = walk.tile(p.row_tiles, walk.begin + j, C::ROWS);
    const bool check = sparse || (r.is_causal && (tile.packed || tile.first < walk.full));
    const float scale = r.scale * kLog2e;
    const bool dropout = C::FULL && values && r.seed != nullptr;
    const uint64_t seed = dropout ? uint64_t(load_global(r.seed)) : 0;
    KeyBits<C> allowed, kept;
    MMFAST_UNROLL
    for (int block = 0; block < C::BLOCKS; ++block) {
      const int at = slot + 8 * block + 2 * t;
      const Vec2 lse = load_shared(reinterpret_cast<const Vec2*>(rows.lse + at));
      Row pair[2];
      if (check || C::FULL) pair[0] = rows.row(at), pair[1] = rows.row(at + 1);
      MMFAST_UNROLL
      for (int i = 0; i < F; ++i) {
        const int32_t m = first + own + 16 * i + g8;
        uint32_t seen = 15;
        if (check) {
          seen = 0;
          MMFAST_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int32_t key = m + 8 * (e >> 1);
            bool sees = key < pair[e & 1].end;
            if (C::FULL && sparse) sees = may_attend_of(r, pair[e & 1], key, segments[i][e >> 1]);
            seen |= uint32_t(sees) << e;
          }
        } else if (C::FULL) {
          seen = (m < l.kv ? 3 : 0) | (m + 8 < l.kv ? 12 : 0);
        }
        if (C::FULL || check) allowed.set(i, block, seen);
        if (dropout)
          kept.set(i, block, survivors_of_keys(r, seed, b, pair[0], pair[1], first + own + 16 * i));
        MMFAST_UNROLL
        for (int e = 0; e < 4; ++e) {
          float x = s[i][block][e] * scale - as_float(lse.x[e & 1]);
          if constexpr (C::FULL) {
            if (r.bias.data != nullptr && (seen >> e & 1) != 0 && pair[e & 1].end > 0)
              x += bias_of(r, pair[e & 1], m + 8 * (e >> 1));
          }
          s[i][block][e] = exp2_approx(x);
          if (check) s[i][block][e] = (seen >> e & 1) != 0 ? s[i][block][e] : 0.0f;
        }
      }
    }

    // dv += weights^T dout, of the weights that dropout has left.
    if constexpr (DV) {
      if (values) {
        add_rows<RowsTile, false>(dv, dout_tile, [&](typename Operand<T>::A& x, int i, int step) {
          if (dropout) {
            constexpr int WIDE = Operand<T>::DEPTH / 8;
            float weights[WIDE][4];
            MMFAST_UNROLL
            for (int block = 0; block < WIDE; ++block) {
              MMFAST_UNROLL
              for (int e = 0; e < 4; ++e)
                weights[block][e] = kept.get(i, WIDE * step + block, e)
                                        ? s[i][WIDE * step + block][e] * r.keep_scale
                                        : 0.0f;
            }
            a_from_sums<T>(x, weights, 0);
          } else {
            a_from_sums<T>(x, s[i], step);
          }
        });
      }
    }

    // dk += dS^T q, dS = weights * (what came in for them - delta).
    if constexpr (DK) {
      float ds[F][C::BLOCKS][4] = {};
      if (values) multiply_rows<KeyTile, RowsTile>(ds, v_tile, own, dout_tile);
      MMFAST_UNROLL
      for (int block = 0; block < C::BLOCKS; ++block) {
        const int at = slot + 8 * block + 2 * t;
        const Vec2 delta = load_shared(reinterpret_cast<const Vec2*>(rows.delta + at));
        MMFAST_UNROLL
        for (int i = 0; i < F; ++i) {
          MMFAST_UNROLL
          for (int e = 0; e < 4; ++e) {
            float in = ds[i][block][e];
            const bool sees = !(C::FULL || check) || allowed.get(i, block, e);
            if (dropout) in = kept.get(i, block, e) ? in * r.keep_scale : 0.0f;
            if (C::FULL && !values) {
              const int32_t m = first + own + 16 * i + 8 * (e >> 1) + g8;
              const Row row = rows.row(at + (e & 1));
              in = sees && row.end > 0 ? gradient_of_pair<T>(a, row, b, m) : 0.0f;
            }
            const float x = s[i][block][e] * (in - as_float(delta.x[e & 1]));
            ds[i][block][e] = !check || sees ? x : 0.0f;
          }
        }
      }
      add_rows<RowsTile, false>(dk, q_tile, [&](typename Operand<T>::A& x, int i, int step) {
        a_from_sums<T>(x, ds[i], step);
      });
    }
    if (ahead) put(j + 2, next);
  }

  // A padded key's sums may be anything: its gradients are zeros.
  if constexpr (DK) store_keys<C>(dk, a.dk, p.dk, p, l, b, g, first + own, part, a.D, r.scale);
  if constexpr (DV)
    if (values) store_keys<C>(dv, a.dv, p.dv, p, l, b, g, first + own, part, a.Dv, 1.0f);
}

template <class C>
MMFAST_KERNEL(C::THREADS, C::MIN_BLOCKS)
cross_attention_dkv_kernel(MMFAST_PARAM(BackwardPass) p) {
  uint32_t i = uint32_t(blockIdx.x);
  const uint32_t blocks = uint32_t(p.shape.blocks);
  const bool of_dv = C::APART && blocks == 2 && i % blocks == 0;
  if (C::APART) i /= blocks;
  const int32_t first = int32_t(i % uint32_t(p.tiles)) * C::KEYS;
  i /= uint32_t(p.tiles);
  const int32_t part = int32_t(i % uint32_t(p.splits));
  i /= uint32_t(p.splits);
  const int32_t g = int32_t(i % uint32_t(p.a.rules.G)), b = int32_t(i / uint32_t(p.a.rules.G));
  if constexpr (C::APART) {
    if (of_dv)
      make_dk_dv<C, false, true>(p, b, g, first, part);
    else
      make_dk_dv<C, true, false>(p, b, g, first, part);
  } else {
    make_dk_dv<C, true, true>(p, b, g, first, part);
  }
}

template <class C>
void launch_keys(const BackwardPass& p, const Stream& stream) {
  const int64_t blocks = int64_t(p.shape.blocks) * p.tiles * p.splits * p.a.rules.G * p.a.rules.B;
  launch<cross_attention_dkv_kernel<C>>({blocks}, C::THREADS, C::shared_size(), stream, p);
}

}  // namespace mmfast
