// cross_attention, forward: sigmoid(gate) * (dropout(softmax(scale q k^T + bias)) v), and LSE.
//
// A block takes a tile of query rows of one key head and goes over the tiles of its keys with a
// running softmax (Milakov & Gimelshein 2018; Dao 2023). Each warp has rows of its own: their sums
// stay in registers, weights go from the first product's sums straight into the second, and warps
// meet only where a tile of keys or values comes or goes. Tiles that lengths, causality or segments
// rule out are not visited. Where blocks are too few to fill a device the keys are cut into splits,
// whose results cross_attention_merge.cuh merges.
#pragma once
#include "cross_attention_fwd_epilogue.cuh"
#include "cross_attention_fwd_softmax.cuh"
#include "launch.cuh"
#include "segment_span.cuh"

namespace mmfast {

// The ring of tiles in shared memory through which keys and values come, in the order in which they
// are used: the keys that begin at `start`, their values, the keys after them. RING - 1 tiles are
// on their way beyond the one in use; one barrier a tile says both that it has come for all threads
// and that nobody reads the one before it any more, whose place the next one takes.
template <class F>
struct KeyRing {
  using T = typename F::T;
  T* tiles;
  KeyCopy<F> keys, values;
  int32_t high;

  template <bool VALUES>
  MMFAST_DEVICE T* place(int32_t start) const {
    const int32_t turn = F::RING == 2 ? 0 : 2 * (start / F::KEYS & 1);
    return tiles + (turn + int(VALUES)) * F::Keys::ELEMENTS;
  }

  template <bool VALUES>
  MMFAST_DEVICE void issue(int32_t start) {
    if (start < high) (VALUES ? values : keys).issue(place<VALUES>(start), high - start);
    cp_async_commit();
  }

  MMFAST_DEVICE void begin(int32_t start) {
    issue<false>(start);
    if constexpr (F::RING == 4) {
      issue<true>(start);
      issue<false>(start + F::KEYS);
    }
  }

  // A tile that has come; starts the one that is RING - 1 further on.
  template <bool VALUES>
  MMFAST_DEVICE const T* next(int32_t start) {
    cp_async_wait<F::RING - 2>();
    sync_threads();
    issue<!VALUES>(start + (F::RING / 2 - int(!VALUES)) * F::KEYS);
    return place<VALUES>(start);
  }
};

// s += q k^T of a warp's rows.
template <class F>
MMFAST_DEVICE void multiply_keys(float (&s)[F::GROUPS][F::KEYS / 8][4], const typename F::T* q,
                                 const typename Operand<typename F::T>::A* held,
                                 const typename F::T* keys) {
  using T = typename F::T;
  constexpr int DEPTH = Operand<T>::DEPTH;
  MMFAST_UNROLL
  for (int k = 0; k < F::WIDTH / DEPTH; ++k) {
    typename Operand<T>::A a[F::GROUPS];
    MMFAST_UNROLL
    for (int i = 0; i < F::GROUPS; ++i) {
      if constexpr (F::HELD)
        a[i] = held[k];
      else
        load_a<typename F::Queries>(a[i], q, warp_id() * F::WARP_ROWS + 16 * i, k * DEPTH);
    }
    MMFAST_UNROLL
    for (int j = 0; j < F::KEYS / 16; ++j) {
      typename Operand<T>::B b;
      load_b<typename F::Keys>(b, keys, 16 * j, k * DEPTH);
      MMFAST_UNROLL
      for (int i = 0; i < F::GROUPS; ++i) multiply<T>(s[i][2 * j], s[i][2 * j + 1], a[i], b);
    }
  }
}

// sums += p v of a warp's rows. sparse: only of keys that are `seen`.
template <class F>
MMFAST_DEVICE void add_values(float (&sums)[F::GROUPS][F::WIDTH / 8][4],
                              const float (&p)[F::GROUPS][F::KEYS / 8][4],
                              const typename F::T* values, bool sparse, uint32_t seen) {
  using T = typename F::T;
  constexpr int DEPTH = Operand<T>::DEPTH;
  MMFAST_UNROLL
  for (int k = 0; k < F::KEYS / DEPTH; ++k) {
    typename Operand<T>::A a[F::GROUPS];
    MMFAST_UNROLL
    for (int i = 0; i < F::GROUPS; ++i) a_from_sums<T>(a[i], p[i], k);
    MMFAST_UNROLL
    for (int j = 0; j < F::WIDTH / 16; ++j) {
      typename Operand<T>::B b;
      load_b_rows<typename F::Keys>(b, values, k * DEPTH, 16 * j);
      if (F::FULL && sparse) clear_values<T>(b, seen, k);
      MMFAST_UNROLL
      for (int i = 0; i < F::GROUPS; ++i) multiply<T>(sums[i][2 * j], sums[i][2 * j + 1], a[i], b);
    }
  }
}

// Narrows [low, high) to the keys whose segments some row of the tile may see.
template <class F>
MMFAST_DEVICE void narrow_to_segments(const AttentionRules& a, int32_t b, const Row (&rows)[2],
                                      KeyRange& range, int32_t* scratch) {
  Span wanted = {kGreatest, kLeast};
  MMFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (rows[i].end == 0) continue;
    const int32_t segment = rows[i].segment, least = a.segments_at_most ? kLeast : segment;
    wanted.least = least < wanted.least ? least : wanted.least;
    wanted.greatest = segment > wanted.greatest ? segment : wanted.greatest;
  }
  wanted = span_of_block<F::WARPS>(wanted, scratch);
  const Span found = positions_of_segments<F::WARPS>(a.kv_segments + int64_t(b) * a.M + range.low,
                                                     range.high - range.low, wanted, scratch);
  range.high = found.least > found.greatest ? range.low : range.low + found.greatest + 1;
  if (found.least <= found.greatest) range.low += found.least / F::KEYS * F::KEYS;
}

// Whether a block has no row of a packed item: only the LSE has places for them. Where items differ
// much in length that is most blocks.
template <class F>
MMFAST_DEVICE bool is_past_the_item(const AttentionRules& a, const BlockPlace& place) {
  if (a.q_starts == nullptr) return false;
  int32_t least, last;
  span_of_rows(place.tile, F::ROWS, least, last);
  return least >= place.l.q;
}

template <class F>
MMFAST_KERNEL(F::THREADS, F::MIN_BLOCKS)
cross_attention_fwd_kernel(MMFAST_PARAM(FwdArgs) args) {
  using T = typename F::T;
  const AttentionArgs& a = args.a;
  const AttentionRules& rules = a.rules;
  SharedMemory shared;
  T* q = shared.template take<T>(F::Queries::ELEMENTS);
  T* ring_tiles = shared.template take<T>(F::RING * F::Keys::ELEMENTS);

  Vec4* kept = shared.template take<Vec4>(BlockPlace::VECTORS);

  const BlockPlace place(args, F::ROWS);
  if (is_past_the_item<F>(rules, place)) return clear_lse<F>(args, place);
  if (threadIdx.x == 0) place.store(kept);
  const int32_t b = place.b, g = place.g;
  const RowTile& tile = place.tile;
  const Lengths& l = place.l;
  [[maybe_unused]] Row rows[2];
  int32_t warp_end = 0, warp_full = kGreatest;
  MMFAST_UNROLL
  for (int i = 0; i < 2 * F::GROUPS; ++i) {
    int32_t h, n;
    const bool inside = tile.find(row_of_lane<F>(i), h, n);
    const int32_t own = row_end(rules, l, inside, n);
    if constexpr (F::FULL) rows[i] = make_row(rules, l, inside, b, g * rules.heads + h, n);
    warp_end = own > warp_end ? own : warp_end;
    if (own > 0 && own < warp_full) warp_full = own;
  }
  MMFAST_UNROLL
  for (int step = 4; step < kWarp; step *= 2) {
    const int32_t most = shuffle_xor(warp_end, step), least = shuffle_xor(warp_full, step);
    warp_end = most > warp_end ? most : warp_end;
    warp_full = least < warp_full ? least : warp_full;
  }

  KeyRange range = key_range(rules, l, tile, F::ROWS, F::KEYS);
  if (args.splits > 1) {
    const int64_t low = int64_t(place.part) * args.chunk, high = low + args.chunk;
    range.low = low < range.high ? int32_t(low) : range.high;
    range.high = high < range.high ? int32_t(high) : range.high;
  }
  if constexpr (F::FULL) {
    if (rules.kv_segments != nullptr)
      narrow_to_segments<F>(rules, b, rows, range, shared.template take<int32_t>(F::SCRATCH));
  }

  const int32_t q_start = start_of(rules.q_starts, b);
  copy_rows<typename F::Queries, F::THREADS>(
      q,
      [&](int i) {
        int32_t h, n;
        const bool there = tile.find(i, h, n) && n < l.q;
        return there ? row_of<const T>(a.q, b, g * rules.heads + h, q_start + n) : nullptr;
      },
      a.D, a.q.wide);
  const int32_t first_key = start_of(rules.kv_starts, b) + range.low;
  KeyRing<F> ring = {ring_tiles, KeyCopy<F>(a.k, b, g, first_key, a.D),
                     KeyCopy<F>(a.v, b, g, first_key, a.Dv), range.high};
  ring.begin(range.low);

  float sums[F::GROUPS][F::WIDTH / 8][4] = {};
  RowSoftmax<F> state;
  [[maybe_unused]] typename Operand<T>::A held[F::HELD ? F::WIDTH / Operand<T>::DEPTH : 1];
  const bool sparse = F::FULL && (rules.mask.data != nullptr || rules.kv_segments != nullptr);
  const uint64_t seed = F::FULL && rules.seed != nullptr ? uint64_t(load_global(rules.seed)) : 0;

  if constexpr (F::HELD) {
    cp_async_wait<F::RING - 2>();
    sync_threads();
    MMFAST_UNROLL
    for (int k = 0; k < F::WIDTH / Operand<T>::DEPTH; ++k)
      load_a<typename F::Queries>(held[k], q, warp_id() * F::WARP_ROWS, k * Operand<T>::DEPTH);
  }
  for (int32_t start = range.low; start < range.high; start += F::KEYS) {
    const T* keys = ring.template next<false>(start);
    float s[F::GROUPS][F::KEYS / 8][4] = {};
    uint32_t allowed = 0;
    // Of many rows few are padding, and a warp that sees nothing of a tile costs nothing.
    bool visit = F::GROUPS > 1 || start < warp_end;
    if constexpr (F::FULL) {
      allowed = allowed_pairs<F>(rules, rows, b, start, range.high);
      visit = any(allowed != 0);
    }
    if (visit) multiply_keys<F>(s, q, held, keys);
    const T* values = ring.template next<true>(start);
    if (!visit) continue;
    if constexpr (F::FULL) {
      finish_scores<F>(s[0], rules, rows, start, allowed, args.scale);
      weigh<F>(s, sums, state, 1.0f);
      if (rules.seed != nullptr) drop<F>(s[0], rules, seed, rows, b, start);
      add_values<F>(sums, s, values, sparse, sparse ? seen_keys<F>(allowed) : 0);
    } else {
      if (warp_full - start < F::KEYS) cut<F>(s, rules, BlockPlace(args, kept), start);
      weigh<F>(s, sums, state, args.scale);
      add_values<F>(sums, s, values, false, 0);
    }
  }
  // Queries that came for nothing are not to overwrite results.
  cp_async_wait<0>();
  sync_threads();

  const BlockPlace end(args, kept);
  finish_rows<F>(sums, state, rules, end);
  MMFAST_UNROLL
  for (int i = 0; i < 2 * F::GROUPS; ++i) {
    const int first = warp_id() * F::WARP_ROWS + 8 * i;
    store_rows<F>(args, sums[i / 2], i % 2, state.base[i / 2][i % 2], end, first,
                  reinterpret_cast<float*>(q + (first / 16 * 16) * F::WIDTH));
  }
}

}  // namespace mmfast
