// The way of a lane into a collective and on to another lane. Inlined: every lane goes it at every
// collective, and it decides how fast the host run is.
#pragma once
#include "block.h"

namespace mmfast::host {

inline uint32_t rotated(uint32_t mask, int by) { return mask >> by | mask << (-by & 31); }

inline int pick_lane(const Warp& warp) {
  const uint32_t mask = rotated(warp.ready, warp.rotation);
  const int lane = warp.descending ? 31 - __builtin_clz(mask) : __builtin_ctz(mask);
  return (lane + warp.rotation) & (kLanes - 1);
}

// The current thread cannot go on: another one does, until something has made this one ready.
inline void yield(Thread& self, Warp& warp) {
  Warp* next = &warp;
  if (__builtin_expect(warp.ready == 0 || --block.turns <= 0, 0)) {
    if (warp.ready == 0) block.ready_warps &= ~(1u << self.warp);
    next = &pick_warp(self.warp);
  }
  Thread& thread = next->threads[pick_lane(*next)];
  state.thread = &thread;
  switch_fiber(self.fiber, thread.fiber);
}

// True for the last lane of a collective: it does the work of all, and calls `leave`. The others
// return when that is done.
inline bool arrive(Warp& warp, Thread& self, Kind kind, const Site& site) {
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.site = site;
  }
  if (__builtin_expect((warp.ready | warp.arrived) != kAllLanes || warp.kind != kind ||
                           warp.site.line != site.line || warp.site.file != site.file,
                       0)) {
    fail_divergent(kind, site);
  }
  const uint32_t bit = 1u << self.lane;
  warp.ready &= ~bit;
  warp.arrived |= bit;
  if (warp.arrived == kAllLanes) return true;
  yield(self, warp);
  return false;
}

inline void leave(Warp& warp) {
  count_collective(warp);
  warp.arrived = 0;
  warp.ready = kAllLanes;
  end_collective(warp);
}

}  // namespace mmfast::host
