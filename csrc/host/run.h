// What a kernel that runs on the CPU asks of its warp and its block, and how a grid is run. The
// functions are in csrc/host/*.cpp, which the sanitizers never instrument: all state of the run is
// written there, so that what they report is the kernel's own.
#pragma once
#include <stdint.h>

#include <string>

namespace mmfast::host {

// Where in the kernel's source something was called.
struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

struct Index3 {
  unsigned x, y, z;
};

enum class Access : uint8_t {
  kLoadShared,
  kStoreShared,
  kCopyToShared,
  kMatrixRow,
  kLoadGlobal,
  kStoreGlobal,
  kCopyFromGlobal,
};

// What the lanes of a warp do together, and the barrier of the block.
enum class Kind : uint8_t {
  kNone,
  kSyncWarp,
  kShuffle,
  kBallot,
  kLdmatrixX2,
  kLdmatrixX2Trans,
  kLdmatrixX4,
  kLdmatrixX4Trans,
  kMmaBf16,
  kMmaF16,
  kMmaTf32,
  kSyncThreads,
};

struct Thread;  // fiber.h

struct ThreadView {
  Index3 index;
};

// What the inlined part of the device functions reads. One grid runs at a time.
struct State {
  ThreadView* thread;
  Index3 block, grid, block_dim;
  unsigned char* shared;
  const uint8_t* valid;  // for each 16 bytes of shared memory, how many of them belong to an array
  uint64_t shared_capacity;
  bool counting;
};
extern State state;

struct Row {
  uint64_t lo, hi;
};

struct Copy {
  void* to;
  uint64_t words[2];
};

struct MmaOperands {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

void* take_shared(int index, int64_t bytes, int64_t rounded, Site site);
[[noreturn]] void bad_shared(const void* p, uint32_t bytes, Access access, Site site);
[[noreturn]] void bad_global(const void* p, uint32_t bytes, Access access, Site site);
void count_access(const void* p, uint32_t bytes, Access access, Site site);

void sync_threads(Site site);
void sync_warp(Site site);
uint32_t shuffle(uint32_t value, int lane, Site site);
uint32_t ballot(bool predicate, Site site);
void ldmatrix(uint32_t* r, int matrices, bool transposed, Row row, const void* address, Site site);
void mma(Kind kind, const MmaOperands& operands, Site site);

void begin_copy(void* to, uint64_t lo, uint64_t hi);
void commit_copies();
// The next copy to be done so that at most `groups` of the thread's groups stay under way.
const Copy* next_copy(int groups);

struct Launch {
  std::string kernel;
  Index3 grid;
  int threads;
  int64_t shared_bytes;
  void (*body)(void*);  // runs one thread
  void* context;
};

// Runs every block of the grid, one after the other. Throws std::runtime_error with one sentence
// that names the kernel, the block and the thread.
void run_grid(const Launch& launch);

}  // namespace mmfast::host
