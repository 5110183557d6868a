// The block that is running: its threads, its warps, its shared memory. Internal to csrc/host.
#pragma once
#include <stdint.h>

#include <string>
#include <vector>

#if defined(MMFAST_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#endif

#include "fiber.h"
#include "run.h"

namespace mmfast::host {

constexpr int kLanes = 32;
constexpr int kMaxWarps = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct PendingCopies {
  // A type of its own: vectors of it are compiled here only, never taken from an instrumented file.
  struct Group {
    size_t end;  // in `copies`
  };
  std::vector<Copy> copies;
  std::vector<Group> groups;  // committed
  size_t next_copy = 0;
  size_t next_group = 0;

  void clear() {
    copies.clear();
    groups.clear();
    next_copy = next_group = 0;
  }
};

struct Thread : ThreadView {
  Fiber fiber;
  int warp = 0;
  int lane = 0;
  PendingCopies pending;
};

struct Warp {
  Thread* threads = nullptr;  // 32
  uint32_t ready = 0;         // lanes that may run
  uint32_t arrived = 0;       // lanes that wait for the others in a collective
  uint32_t done = 0;
  Kind kind = Kind::kNone;
  Site site = {"", 0};
  int rotation = 0;
  bool descending = false;
  // What the lanes bring to a collective, and take from it.
  uint32_t value[kLanes];
  int source[kLanes];
  uint32_t result[kLanes];
  Row row[kLanes];
  const void* address[kLanes];
  uint32_t* registers[kLanes];
  const MmaOperands* operands[kLanes];
  int phase = 0;  // counts synchronisations, for ThreadSanitizer
};

struct Block {
  const Launch* launch = nullptr;
  Warp warps[kMaxWarps];
  int warp_count = 0;
  uint32_t ready_warps = 0;
  int at_barrier = 0;
  int done = 0;
  Site barrier_site = {"", 0};
  Thread* barrier_first = nullptr;
  int64_t turns = 0;  // how often a lane may yet hand on to one of its own warp
  int phase = 0;      // counts synchronisations, for ThreadSanitizer
};

extern Block block;

inline Thread& current() { return *static_cast<Thread*>(state.thread); }

// Ends the run of the grid with a sentence about the current thread, which never goes on.
[[noreturn]] void fail(const std::string& what);
std::string describe(const Site& site);

// run.cpp
[[noreturn]] void fail_divergent(Kind kind, const Site& site);

// schedule.cpp
void begin_schedule();
void begin_block_schedule();
std::vector<uint32_t> block_order(uint64_t blocks);
Warp& pick_warp(int now);
void end_collective(Warp& warp);

// What AddressSanitizer is to report when the kernel touches it. Not its macros, which do nothing
// in files that are not instrumented themselves.
#if defined(MMFAST_HOST_ASAN)
inline void poison(void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif

// shared.cpp
void begin_block_shared(int64_t bytes);
void end_shared();

// What the threads of a warp (or of the whole block: kBarrier) synchronise by, as ThreadSanitizer
// sees it. Two objects take turns, so that a thread that is late does not learn of what the others
// did after they had passed.
constexpr int kBarrier = kMaxWarps;
constexpr int kFinished = kMaxWarps + 1;
#if defined(MMFAST_HOST_TSAN)
void acquire(int which, int phase);
void release(int which, int phase);
#else
inline void acquire(int, int) {}
inline void release(int, int) {}
#endif

// counters.cpp
void record_launch(const Launch& launch);
void begin_counters(const Launch& launch);
void count_collective(const Warp& warp);
void count_barrier();
void count_shared_asked(int64_t bytes);
void flush_accesses(int warp);
void flush_all_accesses();

}  // namespace mmfast::host
