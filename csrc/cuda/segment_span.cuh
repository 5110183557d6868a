// Which part of a sequence has segments within a range: by a whole block, before it begins its
// loop.
#pragma once
#include "attention_rules.cuh"
#include "device.cuh"

namespace mmfast {

struct Span {
  int32_t least, greatest;
};

// The least and the greatest over a block of what its threads have; `scratch` has 2 * WARPS
// elements. Every thread calls it; it begins and ends with a barrier.
template <int WARPS>
MMFAST_DEVICE Span span_of_block(Span own, int32_t* scratch) {
  MMFAST_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    const int32_t least = shuffle_xor(own.least, mask), greatest = shuffle_xor(own.greatest, mask);
    own.least = least < own.least ? least : own.least;
    own.greatest = greatest > own.greatest ? greatest : own.greatest;
  }
  sync_threads();
  if (lane_id() == 0) {
    store_shared(scratch + 2 * warp_id(), own.least);
    store_shared(scratch + 2 * warp_id() + 1, own.greatest);
  }
  sync_threads();
  Span all = {kGreatest, kLeast};
  MMFAST_UNROLL
  for (int w = 0; w < WARPS; ++w) {
    const int32_t least = load_shared(scratch + 2 * w), greatest = load_shared(scratch + 2 * w + 1);
    all.least = least < all.least ? least : all.least;
    all.greatest = greatest > all.greatest ? greatest : all.greatest;
  }
  sync_threads();
  return all;
}

// The first and the last of `count` positions whose segment is in [wanted.least, wanted.greatest];
// first > last where there is none.
template <int WARPS>
MMFAST_DEVICE Span positions_of_segments(const int32_t* segments, int32_t count, Span wanted,
                                         int32_t* scratch) {
  Span found = {kGreatest, kLeast};
  for (int32_t i = int32_t(threadIdx.x); i < count; i += WARPS * 32) {
    const int32_t s = load_global(segments + i);
    if (s < wanted.least || s > wanted.greatest) continue;
    found.least = i < found.least ? i : found.least;
    found.greatest = i;
  }
  return span_of_block<WARPS>(found, scratch);
}

}  // namespace mmfast
