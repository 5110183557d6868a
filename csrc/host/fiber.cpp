#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

#if defined(MMFAST_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#elif defined(MMFAST_HOST_TSAN)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
}
#endif

// Keeps what the calling convention says a function keeps, on the stack that is left.
#if defined(__x86_64__)
// The last step is a jump and not a return: the processor predicts returns from a stack of its own,
// which never fits here.
asm(R"(
.text
.globl mmfast_host_switch
.hidden mmfast_host_switch
.type mmfast_host_switch, @function
mmfast_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size mmfast_host_switch, .-mmfast_host_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl mmfast_host_switch
.hidden mmfast_host_switch
.type mmfast_host_switch, %function
mmfast_host_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  br x30
.size mmfast_host_switch, .-mmfast_host_switch
)");
#else
#error "csrc/host knows how to switch fibers on x86-64 and aarch64"
#endif

namespace mmfast::host {
namespace {

#if defined(MMFAST_HOST_ASAN)
constexpr size_t kStackBytes = 512 * 1024;
#elif defined(MMFAST_HOST_TSAN)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

#if defined(__x86_64__)
constexpr int kReturnWord = 6;
constexpr int kFrameWords = 7;
constexpr size_t kMisalignment = 8;  // as if a call had pushed a return address
#else
constexpr int kReturnWord = 11;
constexpr int kFrameWords = 20;
constexpr size_t kMisalignment = 0;
#endif

void map_stack(Fiber& fiber) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  void* p = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p, page, PROT_NONE) != 0)
    throw std::runtime_error("host run: no memory for the stacks of a block's threads");
  fiber.stack = static_cast<char*>(p) + page;
  fiber.stack_bytes = kStackBytes;
}

}  // namespace

void prepare(Fiber& fiber, int colour, void (*entry)()) {
  if (fiber.stack == nullptr) map_stack(fiber);
  const uintptr_t end = reinterpret_cast<uintptr_t>(fiber.stack + fiber.stack_bytes) - 64;
  const uintptr_t top = end - uintptr_t(colour % 61) * 192;
  void** base = reinterpret_cast<void**>((top & ~uintptr_t(15)) - kMisalignment);
  *base = nullptr;  // where a stack trace ends
  void** frame = base - kFrameWords;
  for (int i = 0; i < kFrameWords; ++i) frame[i] = nullptr;
  frame[kReturnWord] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = frame;
  fiber.fake_stack = nullptr;
#if defined(MMFAST_HOST_TSAN)
  fiber.sanitizer = __tsan_create_fiber(0);
#endif
}

void entered([[maybe_unused]] Fiber& fiber, [[maybe_unused]] Fiber& caller) {
#if defined(MMFAST_HOST_ASAN)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &bottom, &bytes);
  // Whoever started the first fiber is the caller: the sanitizer tells where its stack lies.
  if (caller.stack == nullptr) {
    caller.stack = static_cast<char*>(const_cast<void*>(bottom));
    caller.stack_bytes = bytes;
  }
#endif
}

void discard([[maybe_unused]] Fiber& fiber) {
#if defined(MMFAST_HOST_ASAN)
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
#elif defined(MMFAST_HOST_TSAN)
  if (fiber.sanitizer != nullptr) __tsan_destroy_fiber(fiber.sanitizer);
  fiber.sanitizer = nullptr;
  // The next block's thread may be given the same memory, which has to be as new to
  // ThreadSanitizer.
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  munmap(fiber.stack - page, fiber.stack_bytes + page);
  fiber.stack = nullptr;
#endif
}

}  // namespace mmfast::host
