// A block's shared memory, and the copies into it that are under way.
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "block.h"

#if defined(MMFAST_HOST_TSAN)
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace mmfast::host {
namespace {

constexpr int kAlignment = 128;
constexpr int kMaxArrays = 64;
constexpr int kGap = 128;  // between arrays: belongs to nobody

struct Array {
  int64_t bytes;
  int64_t offset;
};

// Behind the memory that arrays are taken from lie the objects of `synchronise`, 8 bytes each.
constexpr int64_t kSynchronisedBytes = (kMaxWarps + 2) * 2 * 8;

Array arrays[kMaxArrays];
int array_count = 0;
int64_t asked = 0;
int64_t launched = 0;
int64_t next_offset = 0;
std::vector<uint8_t> valid;
// The heap blocks of the launch: one that every block uses anew, except under ThreadSanitizer,
// where freeing one would order the blocks among themselves.
std::vector<unsigned char*> kept;
int64_t kept_bytes = 0;
int64_t allocated = 0;

constexpr int64_t kKeptLimit = 256 << 20;

unsigned char* allocate(int64_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, kAlignment, size_t(bytes)) != 0) abort();
  kept.push_back(static_cast<unsigned char*>(p));
  kept_bytes += bytes;
  return kept.back();
}

}  // namespace

void begin_block_shared(int64_t bytes) {
  launched = bytes;
  state.shared_capacity =
      uint64_t((bytes + kAlignment - 1) / kAlignment * kAlignment) + uint64_t(kMaxArrays) * kGap;
  const int64_t wanted = int64_t(state.shared_capacity) + kSynchronisedBytes;
#if defined(MMFAST_HOST_TSAN)
  if (kept_bytes > kKeptLimit) end_shared();
  state.shared = allocate(wanted);
#else
  if (wanted != allocated) {
    end_shared();
    state.shared = allocate(wanted);
    allocated = wanted;
  }
#endif
  unpoison(state.shared, state.shared_capacity);
  // As bf16, f16 and float these are NaNs.
  memset(state.shared, 0xff, state.shared_capacity);
  poison(state.shared, state.shared_capacity);
  valid.assign(state.shared_capacity / 16, 0);
  state.valid = valid.data();
  array_count = 0;
  asked = next_offset = 0;
}

void end_shared() {
#if defined(MMFAST_HOST_TSAN)
  for (unsigned char* p : kept) {
    state.shared = p;
    acquire(kFinished, 0);
  }
#endif
  for (unsigned char* p : kept) {
    unpoison(p, allocated);
    free(p);
  }
  kept.clear();
  kept_bytes = allocated = 0;
  state.shared = nullptr;
}

#if defined(MMFAST_HOST_TSAN)
namespace {
void* synchronised(int which, int phase) {
  return state.shared + state.shared_capacity + (which * 2 + phase) * 8;
}
}  // namespace
void acquire(int which, int phase) { __tsan_acquire(synchronised(which, phase)); }
void release(int which, int phase) { __tsan_release(synchronised(which, phase)); }
#endif

void* take_shared(int index, int64_t bytes, int64_t rounded, Site site) {
  if (index < array_count) {
    if (arrays[index].bytes != bytes)
      fail("it takes an array of " + std::to_string(bytes) + " bytes of shared memory (" +
           describe(site) + ") where another thread took " + std::to_string(arrays[index].bytes));
    return state.shared + arrays[index].offset;
  }
  if (index >= kMaxArrays) fail("it takes more than 64 arrays of shared memory");
  asked += rounded;
  if (bytes < 0 || asked > launched)
    fail("it takes " + std::to_string(asked) + " bytes of shared memory (" + describe(site) +
         "), but the launch gave " + std::to_string(launched));
  unsigned char* p = state.shared + next_offset;
  unpoison(p, bytes);
  uint8_t* belongs = valid.data() + next_offset / 16;
  memset(belongs, 16, size_t(bytes / 16));
  if (bytes % 16 != 0) belongs[bytes / 16] = uint8_t(bytes % 16);
  arrays[array_count++] = {bytes, next_offset};
  next_offset += rounded + kGap;
  count_shared_asked(asked);
  return p;
}

void bad_shared(const void* p, uint32_t bytes, Access access, Site site) {
  const char* what = access == Access::kStoreShared    ? "a store"
                     : access == Access::kCopyToShared ? "cp_async16"
                     : access == Access::kMatrixRow    ? "a row of ldmatrix"
                                                       : "a load";
  const int64_t offset = static_cast<const unsigned char*>(p) - state.shared;
  const std::string where =
      std::string(what) + " of " + std::to_string(bytes) + " bytes (" + describe(site) + ")";
  if (offset >= 0 && offset < int64_t(state.shared_capacity)) {
    if (offset % bytes != 0)
      fail("misaligned shared memory: " + where + " at an address that is not a multiple of " +
           std::to_string(bytes));
    for (int i = array_count - 1; i >= 0; --i) {
      if (offset >= arrays[i].offset)
        fail("shared memory overrun: " + where + " at byte " +
             std::to_string(offset - arrays[i].offset) + " of array " + std::to_string(i) +
             ", which has " + std::to_string(arrays[i].bytes) + " bytes");
    }
  }
  fail("shared memory overrun: " + where + " outside of the block's shared memory");
}

void bad_global(const void*, uint32_t bytes, Access access, Site site) {
  const char* what = access == Access::kStoreGlobal      ? "a store"
                     : access == Access::kCopyFromGlobal ? "cp_async16"
                                                         : "a load";
  fail(std::string("misaligned global memory: ") + what + " of " + std::to_string(bytes) +
       " bytes (" + describe(site) + ") at an address that is not a multiple of " +
       std::to_string(bytes));
}

void begin_copy(void* to, uint64_t lo, uint64_t hi) {
  poison(to, 16);
  current().pending.copies.push_back({to, {lo, hi}});
}

void commit_copies() {
  PendingCopies& pending = current().pending;
  pending.groups.push_back({pending.copies.size()});
}

const Copy* next_copy(int groups) {
  PendingCopies& pending = current().pending;
  while (pending.groups.size() - pending.next_group > size_t(groups)) {
    if (pending.next_copy < pending.groups[pending.next_group].end) {
      const Copy& copy = pending.copies[pending.next_copy++];
      unpoison(copy.to, 16);
      return &copy;
    }
    ++pending.next_group;
  }
  if (pending.next_group == pending.groups.size() && pending.next_copy == pending.copies.size())
    pending.clear();
  return nullptr;
}

}  // namespace mmfast::host
