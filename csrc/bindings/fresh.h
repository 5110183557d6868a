// Memory that was just allocated and that an op is about to write in full.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tensor.h"

namespace mmfast {

// Asks for huge pages in the part of a fresh result that they would cover: an allocator hands out
// large results as pages that do not exist yet, and making them 4 KB at a time takes longer than
// writing them. Where the system has no such pages, or the memory is in use, nothing happens.
inline void advise_fresh(const Tensor& t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const auto from = uintptr_t(t.data_ptr());
  const uintptr_t bytes = uintptr_t(t.numel()) * t.element_size();
  if (bytes < kHuge) return;
  const uintptr_t first = (from + kHuge - 1) / kHuge * kHuge, last = (from + bytes) / kHuge * kHuge;
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

}  // namespace mmfast
