// Faults on purpose, run by tools/sanitize.py before the tests: a sanitizer that does not see them
// would not see ours either. They run in torch's threads, through the same door as the kernels.

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr int64_t kItems = 64;

// Every thread writes its own items, and the caller reads them afterwards: no fault.
int64_t clean() {
  std::vector<int64_t> items(kItems);
  torch::stable::parallel_for(0, kItems, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) items[i] = i;
  });
  int64_t sum = 0;
  for (int64_t item : items) sum += item;
  return sum;
}

// Threads add to one number without a word to each other.
int64_t race() {
  int64_t sum = 0;
  volatile int64_t* shared = &sum;
  torch::stable::parallel_for(0, kItems, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) *shared = *shared + i;
  });
  return sum;
}

// Reads one element past the end of a heap block.
int64_t overflow() {
  std::vector<int64_t> items(kItems);
  volatile int64_t* data = items.data();
  int64_t seen = 0;
  torch::stable::parallel_for(0, 1, 1, [&](int64_t, int64_t) { seen = data[kItems]; });
  return seen;
}

// Reads a number at an address that is not a multiple of its size.
int64_t undefined() {
  std::vector<int64_t> items(kItems);
  volatile int64_t* data = reinterpret_cast<int64_t*>(reinterpret_cast<char*>(items.data()) + 1);
  return data[0];
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int64_t planted(const char* name) {
  const std::string wanted(name);
  if (wanted == "race") return race();
  if (wanted == "overflow") return overflow();
  if (wanted == "undefined") return undefined();
  return clean();
}
