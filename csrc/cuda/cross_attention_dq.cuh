// cross_attention, backward, the pass over queries: dq, the gradient of a bias that has an element
// for each pair, and the sums of dS over the keys of each row.
//
// A block holds a tile of rows, Q and dout in shared memory, and goes over their keys, a tile of
// them at a time: while it computes one the next is on its way. A warp has 16 or 32 rows.
#pragma once
#include "cross_attention_bwd.h"
#include "cross_attention_products.cuh"
#include "cross_attention_tile_rows.cuh"
#include "launch.cuh"
#include "segment_span.cuh"

namespace mmfast {

template <class T_, int WIDTH_, bool FULL_>
struct QueriesPass {
  using T = T_;
  static constexpr int WIDTH = WIDTH_;
  static constexpr bool FULL = FULL_, WORDS = sizeof(T) == 4;
  static constexpr int WARPS = WORDS && WIDTH > 128 ? 2 : 4, THREADS = WARPS * 32;
  static constexpr int FRAGMENTS = !WORDS && WIDTH <= 64 && !FULL ? 2 : 1;  // of 16 rows, a warp
  static constexpr int ROWS = WARPS * FRAGMENTS * 16;
  static constexpr int KEYS = WIDTH > 128 || (WORDS && WIDTH > 64) ? 16 : 32;
  static constexpr int STAGES = WORDS && WIDTH > 128 ? 1 : 2;
  static constexpr int MIN_BLOCKS = 2;
  static constexpr int BLOCKS = KEYS / 8;  // of 8 keys
  static constexpr int COLUMNS = WIDTH / 8;

  using RowsTile = Tile<T, ROWS, WIDTH>;
  using KeyTile = Tile<T, KEYS, WIDTH>;
  using Rows = TileRows<ROWS, FULL, false>;

  static constexpr int64_t shared_size() {
    return 2 * shared_bytes<T>(RowsTile::ELEMENTS) +
           2 * shared_bytes<T>(STAGES * KeyTile::ELEMENTS) + Rows::bytes(1) +
           (FULL ? shared_bytes<int32_t>(2 * WARPS) : 0);
  }
};

// The keys that a block goes over: of what its rows may see, what is of its split.
template <class C>
MMFAST_DEVICE KeyRange walk_over_keys(const BackwardPass& p, const Lengths& l, const RowTile& tile,
                                      int32_t b, int32_t part, const typename C::Rows& rows,
                                      int32_t* scratch) {
  const AttentionRules& r = p.a.rules;
  KeyRange range = key_range(r, l, tile, C::ROWS, C::KEYS);
  if constexpr (C::FULL) {
    if (r.kv_segments != nullptr) {
      Span wanted = {kGreatest, kLeast};
      for (int i = int(threadIdx.x); i < C::ROWS; i += C::THREADS) {
        if (load_shared(rows.end + i) == 0) continue;
        const int32_t s = load_shared(rows.segment + i);
        wanted.least = s < wanted.least ? s : wanted.least;
        wanted.greatest = s > wanted.greatest ? s : wanted.greatest;
      }
      wanted = span_of_block<C::WARPS>(wanted, scratch);
      if (r.segments_at_most && wanted.least <= wanted.greatest) wanted.least = kLeast;
      const Span found = positions_of_segments<C::WARPS>(r.kv_segments + int64_t(b) * r.M,
                                                         range.high, wanted, scratch);
      if (found.least > found.greatest) return {0, 0, 0};
      if (found.least > range.low) range.low = found.least / C::KEYS * C::KEYS;
      if (found.greatest + 1 < range.high) range.high = found.greatest + 1;
    }
  }
  const int64_t begin = int64_t(part) * p.keys_of_split, end = begin + p.keys_of_split;
  if (range.low < begin) range.low = int32_t(begin < range.high ? begin : range.high);
  if (range.high > end) range.high = int32_t(end);
  return range;
}

// The gradient of a bias that has an element for each pair: dS of the pairs that a block visits.
template <class C>
MMFAST_DEVICE void store_dbias(const BackwardPass& p, const Row (&row)[C::FRAGMENTS][2],
                               const float (&ds)[C::FRAGMENTS][C::BLOCKS][4], int32_t b,
                               int32_t first, int32_t high) {
  const AttentionPairs& out = p.a.dbias;
  MMFAST_UNROLL
  for (int i = 0; i < C::FRAGMENTS; ++i) {
    MMFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Row& r = row[i][half];
      if (r.end == 0) continue;
      const int64_t at = pairs_row(out, b, r.h, r.n);
      MMFAST_UNROLL
      for (int block = 0; block < C::BLOCKS; ++block) {
        MMFAST_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int32_t m = first + 8 * block + 2 * (lane_id() & 3) + e;
          if (m < high) store_number(out.data, out.dtype, at + m, ds[i][block][2 * half + e]);
        }
      }
    }
  }
}

// And zeros for the pairs of its rows and its split that it does not visit.
template <class C>
MMFAST_DEVICE void clear_dbias(const BackwardPass& p, const RowTile& tile,
                               const typename C::Rows& rows, const KeyRange& range, int32_t b,
                               int32_t g, int32_t part) {
  const AttentionRules& r = p.a.rules;
  const int64_t begin = int64_t(part) * p.keys_of_split;
  const int64_t end = begin + p.keys_of_split < r.M ? begin + p.keys_of_split : r.M;
  for (int i = warp_id(); i < C::ROWS; i += C::WARPS) {
    int32_t head, n;
    if (!tile.find(i, head, n)) continue;
    const int64_t at = pairs_row(p.a.dbias, b, g * r.heads + head, n);
    const bool live = load_shared(rows.end + i) > 0;
    for (int64_t m = begin + lane_id(); m < end; m += 32)
      if (!live || m < range.low || m >= range.high)
        store_number(p.a.dbias.data, p.a.dbias.dtype, at + m, 0.0f);
  }
}

template <class C>
MMFAST_KERNEL(C::THREADS, C::MIN_BLOCKS)
cross_attention_dq_kernel(MMFAST_PARAM(BackwardPass) p) {
  using T = typename C::T;
  using RowsTile = typename C::RowsTile;
  using KeyTile = typename C::KeyTile;
  constexpr int F = C::FRAGMENTS;
  const AttentionArgs& a = p.a;
  const AttentionRules& r = a.rules;
  uint32_t index = uint32_t(blockIdx.x);
  int32_t tile_index = int32_t(index % uint32_t(p.tiles));
  index /= uint32_t(p.tiles);
  const int32_t part = int32_t(index % uint32_t(p.splits));
  index /= uint32_t(p.splits);
  const int32_t g = int32_t(index % uint32_t(r.G)), b = int32_t(index / uint32_t(r.G));
  if (r.is_causal) tile_index = p.tiles - 1 - tile_index;  // those with the most keys begin first
  const RowTile tile = row_tile(p.row_tiles, tile_index, C::ROWS);

  SharedMemory shared;
  T* q_tile = shared.take<T>(RowsTile::ELEMENTS);
  T* dout_tile = shared.take<T>(RowsTile::ELEMENTS);
  T* k_tiles = shared.take<T>(C::STAGES * KeyTile::ELEMENTS);
  T* v_tiles = shared.take<T>(C::STAGES * KeyTile::ELEMENTS);
  typename C::Rows rows;
  rows.take(shared, 1);
  int32_t* scratch = nullptr;
  if constexpr (C::FULL) scratch = shared.take<int32_t>(2 * C::WARPS);

  const Lengths l = lengths(r, b);
  const bool values = !C::FULL || a.v.data != nullptr;
  const bool sparse = C::FULL && is_sparse(r);
  const int lane = lane_id(), t = lane & 3, g8 = lane >> 2, own = warp_id() * F * 16;
  for (int i = int(threadIdx.x); i < C::ROWS; i += C::THREADS) {
    const FoundRow found = find_row(r, l, tile, i, b, g);
    rows.put(i, facts_of_row(a, found, load_row(a, found, b), b, start_of(r.q_starts, b)));
  }
  sync_threads();
  const KeyRange range = walk_over_keys<C>(p, l, tile, b, part, rows, scratch);
  const int count = range.high <= range.low ? 0 : (range.high - range.low + C::KEYS - 1) / C::KEYS;

  const auto copy_tile = [&](int j) {
    const int32_t first = range.low + j * C::KEYS, start = start_of(r.kv_starts, b) + first;
    const int stage = j % C::STAGES * KeyTile::ELEMENTS;
    const auto key_row = [&](const AttentionTensor& x, int i) {
      return first + i < range.high ? row_of<const T>(x, b, g, start + i) : nullptr;
    };
    copy_rows<KeyTile, C::THREADS>(
        k_tiles + stage, [&](int i) { return key_row(a.k, i); }, a.D, a.k.wide);
    if (values)
      copy_rows<KeyTile, C::THREADS>(
          v_tiles + stage, [&](int i) { return key_row(a.v, i); }, a.Dv, a.v.wide);
    cp_async_commit();
  };
  if (count > 0) {
    copy_rows<RowsTile, C::THREADS>(
        q_tile,
        [&](int i) {
          const int64_t at = load_shared(rows.q + i);
          return at < 0 ? nullptr : static_cast<const T*>(a.q.data) + at;
        },
        a.D, a.q.wide);
    if (values)
      copy_rows<RowsTile, C::THREADS>(
          dout_tile,
          [&](int i) {
            const int64_t at = load_shared(rows.dout + i);
            return at < 0 ? nullptr : static_cast<const T*>(a.dout.data) + at;
          },
          a.Dv, a.dout.wide);
    if (C::STAGES == 2) copy_tile(0);
  }

  if constexpr (C::FULL)
    if (p.owns_dbias) clear_dbias<C>(p, tile, rows, range, b, g, part);

  // This lane's rows: 16 i + 8 half + g of its warp.
  float lse[F][2], delta[F][2], sums[F][2] = {};
  Row row[F][2];
  MMFAST_UNROLL
  for (int i = 0; i < F; ++i) {
    MMFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int at = own + 16 * i + 8 * half + g8;
      lse[i][half] = load_shared(rows.lse + at), delta[i][half] = load_shared(rows.delta + at);
      row[i][half] = rows.row(at);
      if constexpr (C::FULL) {
        Row& one = row[i][half];
        tile.find(at, one.h, one.n);
        one.h += g * r.heads;
        if (r.mask.data != nullptr) one.mask = pairs_row(r.mask, b, one.h, one.n);
        if (r.bias.data != nullptr) one.bias = pairs_row(r.bias, b, one.h, one.n);
      }
    }
  }
  const bool dropout = C::FULL && values && r.seed != nullptr;
  uint64_t seed = 0;
  if (dropout) seed = uint64_t(load_global(r.seed));
  const float scale = r.scale * kLog2e;
  float dq[F][C::COLUMNS][4] = {};

  MMFAST_NO_UNROLL
  for (int j = 0; j < count; ++j) {
    if (C::STAGES == 1) {
      if (j > 0) sync_threads();
      copy_tile(j);
    }
    cp_async_wait<0>();
    sync_threads();
    if (C::STAGES == 2 && j + 1 < count) copy_tile(j + 1);
    const T* k_tile = k_tiles + j % C::STAGES * KeyTile::ELEMENTS;
    const T* v_tile = v_tiles + j % C::STAGES * KeyTile::ELEMENTS;
    const int32_t first = range.low + j * C::KEYS;
    const bool check = sparse || first + C::KEYS > range.full;

    float s[F][C::BLOCKS][4] = {}, ds[F][C::BLOCKS][4] = {};
    multiply_rows<RowsTile, KeyTile>(s, q_tile, own, k_tile);
    if (values) multiply_rows<RowsTile, KeyTile>(ds, dout_tile, own, v_tile);
    uint32_t seen = 0;  // keys, by this lane's rows
    MMFAST_UNROLL
    for (int block = 0; block < C::BLOCKS; ++block) {
      const int32_t m = first + 8 * block + 2 * t;
      int32_t segments[2] = {};
      if (C::FULL && sparse) {
        if (m < range.high) segments[0] = key_segment(r, b, m);
        if (m + 1 < range.high) segments[1] = key_segment(r, b, m + 1);
      }
      MMFAST_UNROLL
      for (int i = 0; i < F; ++i) {
        uint32_t kept = 15;
        if (dropout) kept = survivors_of_rows(r, seed, b, row[i][0], row[i][1], first + 8 * block);
        MMFAST_UNROLL
        for (int e = 0; e < 4; ++e) {
          const Row& own_row = row[i][e >> 1];
          const int32_t key = m + (e & 1);
          bool sees = !check || (key < own_row.end && key < range.high);
          if (C::FULL && sparse && sees) sees = may_attend_of(r, own_row, key, segments[e & 1]);
          seen |= uint32_t(sees) << (2 * block + (e & 1));
          float x = s[i][block][e] * scale - lse[i][e >> 1], in = ds[i][block][e];
          if constexpr (C::FULL) {
            const bool there = sees && own_row.end > 0;
            if (r.bias.data != nullptr && there) x += bias_of(r, own_row, key);
            if (!values) in = there ? gradient_of_pair<T>(a, own_row, b, key) : 0.0f;
            if (dropout) in = (kept >> e & 1) != 0 ? in * r.keep_scale : 0.0f;
          }
          const float gradient = exp2_approx(x) * (in - delta[i][e >> 1]);
          ds[i][block][e] = sees ? gradient : 0.0f;
        }
      }
    }
    if constexpr (C::FULL) {
      MMFAST_UNROLL
      for (int i = 0; i < F; ++i) {
        MMFAST_UNROLL
        for (int block = 0; block < C::BLOCKS; ++block) {
          MMFAST_UNROLL
          for (int half = 0; half < 2; ++half)
            sums[i][half] += ds[i][block][2 * half] + ds[i][block][2 * half + 1];
        }
      }
      if (p.owns_dbias) store_dbias<C>(p, row, ds, b, first, range.high);
      // A key that none of the warp's rows sees may hold anything, and 0 * NaN is NaN.
      if (sparse)
        for (int mask = 4; mask < 32; mask *= 2) seen |= shuffle_xor(seen, mask);
    }
    add_rows<KeyTile, C::FULL>(
        dq, k_tile,
        [&](typename Operand<T>::A& x, int i, int step) { a_from_sums<T>(x, ds[i], step); }, sparse,
        seen);
  }

  const int32_t q_start = start_of(r.q_starts, b), places = query_places(r, l);
  MMFAST_UNROLL
  for (int i = 0; i < F; ++i) {
    T* to[2];
    float* partial[2];
    bool there[2];
    MMFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int at = own + 16 * i + 8 * half + g8;
      int32_t head, n;
      const bool inside = tile.find(at, head, n);
      const int32_t h = g * r.heads + head;
      there[half] = row[i][half].end > 0;
      const int64_t flat = ((int64_t(part) * r.B + b) * r.H + h) * r.N + n;
      const bool stored = inside && n < places && p.splits == 1;
      to[half] = stored ? row_of<T>(a.dq, b, h, q_start + n) : nullptr;
      partial[half] = inside && p.splits > 1 ? p.dq + flat * a.D : nullptr;
      if constexpr (C::FULL) {
        float sum = sums[i][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (p.row_sums != nullptr && inside && t == 0)
          store_global(p.row_sums + flat, there[half] ? sum : 0.0f);
      }
    }
    if (p.splits == 1)
      store_sums(dq[i], to, there, a.D, a.dq.wide, r.scale);
    else
      store_sums(dq[i], partial, there, a.D, a.D % 2 == 0, r.scale);
  }
}

template <class C>
void launch_queries(const BackwardPass& p, const Stream& stream) {
  const int64_t blocks = int64_t(p.tiles) * p.splits * p.a.rules.G * p.a.rules.B;
  launch<cross_attention_dq_kernel<C>>({blocks}, C::THREADS, C::shared_size(), stream, p);
}

}  // namespace mmfast
