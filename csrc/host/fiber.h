// Fibers: one for each CUDA thread of the block that is running. A switch is a few instructions
// (ucontext would make a system call), plus what the sanitizers want to be told.
#pragma once
#include <stddef.h>

#if defined(MMFAST_HOST_ASAN)
#include <sanitizer/common_interface_defs.h>
#elif defined(MMFAST_HOST_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

extern "C" __attribute__((visibility("hidden"))) void mmfast_host_switch(void** save, void* load);

namespace mmfast::host {

struct Fiber {
  void* stack_pointer = nullptr;  // of a fiber that is not running
  char* stack = nullptr;          // lowest usable address
  size_t stack_bytes = 0;
  void* sanitizer = nullptr;  // ThreadSanitizer's fiber
  void* fake_stack = nullptr;
};

// Makes the fiber begin in `entry`, which never returns, on a stack mapped at the first call.
// Fibers of different `colour` begin at different offsets of their pages: otherwise their stacks
// would compete for the same lines of the first-level cache.
void prepare(Fiber& fiber, int colour, void (*entry)());

// Continues `to`; returns when something switches back to `from`.
inline void switch_fiber(Fiber& from, Fiber& to) {
#if defined(MMFAST_HOST_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#elif defined(MMFAST_HOST_TSAN)
  if (from.sanitizer == nullptr) from.sanitizer = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.sanitizer, 1);  // 1: a switch orders nothing
#endif
  mmfast_host_switch(&from.stack_pointer, to.stack_pointer);
#if defined(MMFAST_HOST_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// To be called first by an entry, with the fiber of whoever called run_grid.
void entered(Fiber& fiber, Fiber& caller);

// Does something in the name of a fiber that has stopped, as far as ThreadSanitizer is concerned.
template <class Action>
void as_fiber([[maybe_unused]] Fiber& fiber, const Action& action) {
#if defined(MMFAST_HOST_TSAN)
  void* here = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.sanitizer, 1);
  action();
  __tsan_switch_to_fiber(here, 1);
#else
  action();
#endif
}

// Forgets what a fiber that will not go on has left on its stack.
void discard(Fiber& fiber);

}  // namespace mmfast::host
