// Which thread runs next. A thread is never interrupted: it goes on until it waits for others.
//   random       seeded: the order of blocks and lanes, and how long a warp keeps the processor
//   greedy       a warp runs as far ahead as it can; blocks and lanes in order
//   round robin  warps take turns, one collective each; blocks and lanes in order
#include "schedule.h"

#include <numeric>
#include <utility>

#include "arrive.h"

namespace mmfast::host {

Settings settings;

namespace {

uint64_t random_state;
int64_t patience = 0;  // how many turns a warp gets at most
constexpr int64_t kForEver = int64_t(1) << 62;

// splitmix64
uint64_t random_bits() {
  uint64_t x = random_state += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

void shuffle_lanes(Warp& warp, uint64_t bits) {
  warp.rotation = int(bits & 31);
  warp.descending = (bits >> 5 & 1) != 0;
}

}  // namespace

// The same for every launch, so that one that fails can be repeated by itself.
void begin_schedule() { random_state = settings.seed; }

std::vector<uint32_t> block_order(uint64_t blocks) {
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.schedule == Schedule::kRandom)
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  return order;
}

void begin_block_schedule() {
  const bool random = settings.schedule == Schedule::kRandom;
  for (int i = 0; i < block.warp_count; ++i)
    shuffle_lanes(block.warps[i], random ? random_bits() : 0);
  // Some faults show where warps are far apart, some where they are close together.
  constexpr int64_t kPatience[] = {32, 512, 8192, kForEver};
  patience = kPatience[random ? random_bits() % 4 : 3];
  block.turns = patience;
}

// Of those with a ready lane. There is one: whatever could leave none is found before.
Warp& pick_warp(int now) {
  int from = 0;
  if (settings.schedule == Schedule::kRandom) {
    const uint64_t bits = random_bits();
    from = int(bits & 31);
    block.turns = 1 + int64_t((bits >> 8) % uint64_t(patience));
  } else {
    if (settings.schedule == Schedule::kRoundRobin) from = (now + 1) & 31;
    block.turns = kForEver;
  }
  return block.warps[(__builtin_ctz(rotated(block.ready_warps, from)) + from) & 31];
}

void end_collective(Warp& warp) {
  if (settings.schedule == Schedule::kRandom) shuffle_lanes(warp, random_bits());
  if (settings.schedule == Schedule::kRoundRobin) block.turns = 1;
}

}  // namespace mmfast::host
