// Running a grid: fibers, warps, the barrier, and what goes wrong with them.
#include "run.h"

#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "arrive.h"
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

const Thread& any_of(const Warp& warp, uint32_t lanes) {
  return warp.threads[__builtin_ctz(lanes)];
}

// Some thread that has left the kernel; `block.done` says that there is one.
const Thread& any_done() {
  const Warp* warp = block.warps;
  while (warp->done == 0) ++warp;
  return any_of(*warp, warp->done);
}

std::string came_to(Kind kind, const Site& site) {
  return std::string("it came to ") + name_of(kind) + " (" + describe(site) + "), but ";
}

std::string waits(const Thread& thread, Kind kind, const Site& site) {
  return describe(thread) + " waits at " + name_of(kind) + " (" + describe(site) + ")";
}

std::string waits_in_warp(const Warp& warp) {
  return waits(any_of(warp, warp.arrived), warp.kind, warp.site);
}

std::string waits_at_barrier() {
  return waits(*block.barrier_first, Kind::kSyncThreads, block.barrier_site);
}

// Unwinds the thread that found something wrong; the other threads of the block just stop.
struct Failure {};

void describe_failure(const std::string& what) {
  const Index3& b = state.block;
  failure = "host run of " + block.launch->kernel + ": block (" + std::to_string(b.x) + ", " +
            std::to_string(b.y) + ", " + std::to_string(b.z) + "), " + describe(current()) + ": " +
            what;
}

// Some GPUs let threads wait for those that have not left; the kernels here never count on that.
void finish(Thread& self) {
  Warp& warp = block.warps[self.warp];
  if (warp.arrived != 0) fail("it left the kernel, but " + waits_in_warp(warp));
  if (block.at_barrier != 0) fail("it left the kernel, but " + waits_at_barrier());
  warp.ready &= ~(1u << self.lane);
  warp.done |= 1u << self.lane;
  if (warp.done == kAllLanes) flush_accesses(self.warp);
  if (++block.done < block.launch->threads) {
    yield(self, warp);
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

// All that the threads did, finished or not, comes before what the caller does after the launch.
void discard_fibers() {
  for (int i = 0; i < threads_prepared; ++i) {
    Fiber& fiber = threads[i].fiber;
    as_fiber(fiber, [] { release(kFinished, 0); });
    discard(fiber);
  }
  threads_prepared = 0;
}

void prepare_threads(int count) {
  if (!threads) threads = std::make_unique<Thread[]>(kMaxWarps * kLanes);
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.index = {unsigned(i), 0, 0};
    thread.warp = i / kLanes;
    thread.lane = i % kLanes;
    thread.pending.clear();
    if (i >= threads_prepared) prepare(thread.fiber, i, thread_main);
  }
  if (count > threads_prepared) threads_prepared = count;
}

void run_block(const Launch& launch) {
  begin_block_shared(launch.shared_bytes);
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
  // Fibers that stopped half-way, or that a sanitizer knows, are not used again.
  if (kFreshFibers || !failure.empty()) discard_fibers();
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

void fail_divergent(Kind kind, const Site& site) {
  const Warp& warp = block.warps[current().warp];
  if (warp.arrived != 0 && (warp.kind != kind || warp.site.line != site.line ||
                            warp.site.file != site.file || kind == Kind::kSyncThreads))
    fail(came_to(kind, site) + waits_in_warp(warp));
  if (block.done != 0) fail(came_to(kind, site) + describe(any_done()) + " has left the kernel");
  fail(came_to(kind, site) + waits_at_barrier());
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
  if (block.at_barrier == 0) {
    block.barrier_first = &self;
    block.barrier_site = site;
  }
  if (warp.arrived != 0 || block.done != 0 || block.barrier_site.line != site.line ||
      block.barrier_site.file != site.file)
    fail_divergent(Kind::kSyncThreads, site);
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
    yield(self, warp);
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
  end_shared();
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace mmfast::host
