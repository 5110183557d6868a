// Fibers: one for each CUDA thread of the block that is running. A switch is a few instructions
// (ucontext would make a system call), plus what the sanitizers want to be told.
#pragma once
#include <stddef.h>

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
void switch_fiber(Fiber& from, Fiber& to);

// To be called first by an entry, with the fiber of whoever called run_grid.
void entered(Fiber& fiber, Fiber& caller);

// Forgets what a fiber that will not go on has left on its stack.
void discard(Fiber& fiber);

}  // namespace mmfast::host
