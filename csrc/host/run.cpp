// Running a grid: fibers, warps, the barrier, and what goes wrong with them.
#include "run.h"

#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "block.h"
#include "schedule.h"

namespace mmfast::host {

State state;
Block block;

namespace {

std::mutex one_grid;
Fiber caller;
std::unique_ptr<Thread[]> threads;
int threads_prepared = 0;
std::string failure;

// Under a sanitizer every block gets fibers of its own: nothing that one block did to its stacks,
// or in its order, excuses what the next one does.
#if defined(MMFAST_HOST_ASAN) || defined(MMFAST_HOST_TSAN)
constexpr bool kFreshFibers = true;
#else
constexpr bool kFreshFibers = false;
#endif

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kNone:
      return "nothing";
    case Kind::kSyncWarp:
      return "sync_warp";
    case Kind::kShuffle:
      return "a shuffle";
    case Kind::kBallot:
      return "a ballot";
    case Kind::kLdmatrixX2:
    case Kind::kLdmatrixX2Trans:
    case Kind::kLdmatrixX4:
    case Kind::kLdmatrixX4Trans:
      return "an ldmatrix";
    case Kind::kMmaBf16:
    case Kind::kMmaF16:
    case Kind::kMmaTf32:
      return "an mma";
    case Kind::kSyncThreads:
      return "sync_threads";
  }
  return "";
}

std::string describe(const Thread& thread) {
  return "thread " + std::to_string(thread.index.x) + " (warp " + std::to_string(thread.warp) +
         ", lane " + std::to_string(thread.lane) + ")";
}

std::string waits(const Thread& thread) {
  return describe(thread) + " waits at " + name_of(thread.kind) + " (" + describe(thread.site) +
         ")";
}

void switch_to(Thread& next) {
  Thread& from = current();
  state.thread = &next;
  switch_fiber(from.fiber, next.fiber);
}

// The current thread cannot go on: another one does, until something has made this one ready.
void yield(Thread& self) {
  Warp& warp = block.warps[self.warp];
  Warp* next = &warp;
  if (warp.ready == 0) block.ready_warps &= ~(1u << self.warp);
  if (warp.ready == 0 || switch_due(warp)) next = &pick_warp(self.warp);
  switch_to(next->threads[pick_lane(*next)]);
}

// Unwinds the thread that found something wrong; the other threads of the block just stop.
struct Failure {};

void describe_failure(const std::string& what) {
  const Index3& b = state.block;
  failure = "host run of " + block.launch->kernel + ": block (" + std::to_string(b.x) + ", " +
            std::to_string(b.y) + ", " + std::to_string(b.z) + "), " + describe(current()) + ": " +
            what;
}

const Thread& any_of(const Warp& warp, uint32_t lanes) {
  return warp.threads[__builtin_ctz(lanes)];
}

[[noreturn]] void fail_divergent(const char* came_to, const Site& site, const Thread& other) {
  fail(std::string("it came to ") + came_to + " (" + describe(site) + "), but " + waits(other));
}

// Some GPUs let threads wait for those that have not left; the kernels here never count on that.
void finish(Thread& self) {
  Warp& warp = block.warps[self.warp];
  if (warp.arrived != 0) fail("it left the kernel, but " + waits(any_of(warp, warp.arrived)));
  if (block.at_barrier != 0) fail("it left the kernel, but " + waits(*block.barrier_first));
  release(kFinished, 0);
  warp.ready &= ~(1u << self.lane);
  warp.done |= 1u << self.lane;
  if (warp.done == kAllLanes) flush_accesses(self.warp);
  if (++block.done < block.launch->threads) {
    yield(self);
  } else {
    switch_fiber(self.fiber, caller);
  }
}

void thread_main() {
  entered(current().fiber, caller);
  while (failure.empty()) {
    try {
      block.launch->body(block.launch->context);
      finish(current());
    } catch (const Failure&) {
    } catch (const std::exception& error) {
      describe_failure(error.what());
    }
  }
  switch_fiber(current().fiber, caller);
}

void discard_fibers() {
  for (int i = 0; i < threads_prepared; ++i) discard(threads[i].fiber);
  threads_prepared = 0;
}

void prepare_threads(int count) {
  if (!threads) threads = std::make_unique<Thread[]>(kMaxWarps * kLanes);
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.index = {unsigned(i), 0, 0};
    thread.warp = i / kLanes;
    thread.lane = i % kLanes;
    thread.kind = Kind::kNone;
    thread.pending.clear();
    if (i >= threads_prepared) prepare(thread.fiber, i, thread_main);
  }
  if (count > threads_prepared) threads_prepared = count;
}

void run_block(const Launch& launch) {
  begin_block_shared(launch.shared_bytes);
  if (kFreshFibers) discard_fibers();
  prepare_threads(launch.threads);
  block.launch = &launch;
  block.warp_count = launch.threads / kLanes;
  block.ready_warps = block.warp_count == 32 ? ~0u : (1u << block.warp_count) - 1;
  block.at_barrier = block.done = block.phase = 0;
  for (int i = 0; i < block.warp_count; ++i) {
    Warp& warp = block.warps[i];
    warp.threads = &threads[i * kLanes];
    warp.ready = kAllLanes;
    warp.arrived = warp.done = 0;
    warp.phase = 0;
  }
  begin_block_schedule();
  Warp& first = pick_warp(0);
  Thread& thread = first.threads[pick_lane(first)];
  state.thread = &thread;
  switch_fiber(caller, thread.fiber);
}

void run_blocks(const Launch& launch) {
  const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  for (const uint32_t i : block_order(blocks)) {
    state.block = {i % launch.grid.x, i / launch.grid.x % launch.grid.y,
                   i / launch.grid.x / launch.grid.y};
    run_block(launch);
    if (!failure.empty()) return;
  }
}

}  // namespace

std::string describe(const Site& site) {
  const std::string file = site.file;
  const size_t slash = file.rfind('/');
  return (slash == std::string::npos ? file : file.substr(slash + 1)) + ":" +
         std::to_string(site.line);
}

void fail(const std::string& what) {
  describe_failure(what);
  throw Failure();
}

bool arrive(Warp& warp, Thread& thread, Kind kind, const Site& site) {
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.site = site;
  } else if (warp.kind != kind || warp.site.line != site.line || warp.site.file != site.file) {
    fail_divergent(name_of(kind), site, any_of(warp, warp.arrived));
  }
  if ((warp.ready | warp.arrived) != kAllLanes) {
    if (warp.done != 0)
      fail(std::string("it came to ") + name_of(kind) + " (" + describe(site) + "), but " +
           describe(any_of(warp, warp.done)) + " has left the kernel");
    fail_divergent(name_of(kind), site, any_of(warp, ~(warp.ready | warp.arrived)));
  }
  thread.kind = kind;
  thread.site = site;
  const uint32_t bit = 1u << thread.lane;
  warp.ready &= ~bit;
  warp.arrived |= bit;
  if (warp.arrived == kAllLanes) return true;
  yield(thread);
  return false;
}

void leave(Warp& warp) {
  count_collective(warp);
  warp.arrived = 0;
  warp.ready = kAllLanes;
  end_collective(warp);
}

void sync_warp(Site site) {
  Thread& self = current();
  Warp& warp = block.warps[self.warp];
  const int phase = warp.phase & 1;
  release(self.warp, phase);
  if (arrive(warp, self, Kind::kSyncWarp, site)) {
    ++warp.phase;
    leave(warp);
  }
  acquire(self.warp, phase);
}

void sync_threads(Site site) {
  Thread& self = current();
  Warp& warp = block.warps[self.warp];
  if (warp.arrived != 0) fail_divergent("sync_threads", site, any_of(warp, warp.arrived));
  if (block.done != 0) {
    for (int i = 0; i < block.warp_count; ++i) {
      const Warp& other = block.warps[i];
      if (other.done != 0)
        fail("it came to sync_threads (" + describe(site) + "), but " +
             describe(any_of(other, other.done)) + " has left the kernel");
    }
  }
  if (block.at_barrier == 0) {
    block.barrier_first = &self;
  } else if (const Site& first = block.barrier_first->site;
             first.line != site.line || first.file != site.file) {
    fail_divergent("sync_threads", site, *block.barrier_first);
  }
  self.kind = Kind::kSyncThreads;
  self.site = site;
  const int phase = block.phase & 1;
  release(kBarrier, phase);
  warp.ready &= ~(1u << self.lane);
  if (++block.at_barrier == block.launch->threads) {
    flush_all_accesses();
    count_barrier();
    block.at_barrier = 0;
    ++block.phase;
    for (int i = 0; i < block.warp_count; ++i) block.warps[i].ready = kAllLanes;
    block.ready_warps = block.warp_count == 32 ? ~0u : (1u << block.warp_count) - 1;
  } else {
    yield(self);
  }
  acquire(kBarrier, phase);
}

void run_grid(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_grid);
  record_launch(launch);
  if (settings.dry) return;
  failure.clear();
  caller = Fiber();
  state.grid = launch.grid;
  state.block_dim = {unsigned(launch.threads), 1, 1};
  begin_counters(launch);
  begin_schedule();
  run_blocks(launch);
  // Fibers that stopped half-way, or that a sanitizer knows, are not used again.
  if (kFreshFibers || !failure.empty()) discard_fibers();
  end_shared();
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace mmfast::host
