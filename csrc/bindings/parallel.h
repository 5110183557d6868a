// Runs the tasks of a kernel pass on torch's own threads.
#pragma once
#include <atomic>
#include <cstdlib>
#include <new>

#include "../cpu/cross_attention.h"
#include "tensor.h"

namespace mmfast {

// Scratch that a thread keeps from call to call, so that the hot path allocates nothing.
class ThreadScratch {
 public:
  ~ThreadScratch() { drop(); }
  void* get(int64_t bytes) {
    if (bytes > size_) {
      drop();
      const size_t rounded = (size_t(bytes) + 63) / 64 * 64;
      data_ = std::aligned_alloc(64, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = int64_t(rounded);
    }
    return data_;
  }
  void drop() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

inline void* thread_scratch(int64_t bytes) {
  static thread_local ThreadScratch scratch;
#if defined(__SANITIZE_ADDRESS__)
  scratch.drop();  // memory of just this size, so that the sanitizer sees a step past its end
#endif
  return scratch.get(bytes);
}

// Calls f(task, scratch) for every task on torch's threads; scratch has `scratch_bytes`, aligned to
// 64. `work` is a rough count of multiply-adds: below a few microseconds of it, waking another
// thread costs more than it brings. Which thread runs a task must never change a bit of the result.
template <class F>
void parallel_tasks(int64_t tasks, double work, int64_t scratch_bytes, const F& f) {
  if (tasks == 0) return;
  constexpr double kWorthThreads = 3e5;
  const int64_t threads =
      tasks == 1 || work < kWorthThreads ? 1 : int64_t(torch::stable::get_num_threads());
  if (threads == 1) {
    void* scratch = thread_scratch(scratch_bytes);
    for (int64_t task = 0; task < tasks; ++task) f(task, scratch);
    return;
  }
  // Tasks may differ in size: each thread takes the next few that are left. Neighbours share cache
  // lines and pages, so a thread takes a run of them while many are left.
  std::atomic<int64_t> next{0};
  const int64_t run = tasks / (threads * 8) > 1 ? tasks / (threads * 8) : 1;
  torch::stable::parallel_for(0, threads < tasks ? threads : tasks, 1, [&](int64_t, int64_t) {
    void* scratch = thread_scratch(scratch_bytes);
    for (int64_t from = next.fetch_add(run); from < tasks; from = next.fetch_add(run))
      for (int64_t task = from; task < tasks && task < from + run; ++task) f(task, scratch);
  });
}

inline void run_pass(const CrossAttentionKernels::Pass& pass, const CrossAttentionArgs& args,
                     double work) {
  parallel_tasks(pass.tasks(args), work, pass.scratch(args),
                 [&](int64_t task, void* scratch) { pass.run(args, task, scratch); });
}

}  // namespace mmfast
