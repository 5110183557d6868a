// Tells ThreadSanitizer what OpenMP's fork and join mean.
//
// torch's OpenMP runtime is not instrumented, so ThreadSanitizer sees neither that a parallel
// region starts after what came before it nor that it ends before what comes after, and would
// report both as races. Preloaded, this file stands before the runtime's GOMP_parallel and adds
// just these two orders. Between the threads of one region nothing is added: a real race stays one.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);

namespace {

using Body = void (*)(void*);
using Parallel = void (*)(Body, void*, unsigned, unsigned);

struct Region {
  Body body;
  void* data;
  char fork = 0, join = 0;  // only their addresses matter
};

void run(void* opaque) {
  auto* region = static_cast<Region*>(opaque);
  __tsan_acquire(&region->fork);
  region->body(region->data);
  __tsan_release(&region->join);
}

}  // namespace

extern "C" void GOMP_parallel(Body body, void* data, unsigned threads, unsigned flags) {
  static const auto next = reinterpret_cast<Parallel>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  if (next == nullptr) {
    std::fputs("tsan_openmp: no OpenMP runtime behind this one\n", stderr);
    std::abort();
  }
  Region region{body, data};
  __tsan_release(&region.fork);
  next(run, &region, threads, flags);
  __tsan_acquire(&region.join);
}
