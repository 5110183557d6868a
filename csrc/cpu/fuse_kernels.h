// Gathers the kernels of fuse into the table of one instruction set.
#pragma once
#include "fuse_bwd.h"

namespace {

template <class S>
int64_t fuse_scratch(const mmfast::FuseArgs& a) {
  const bool table = a.per_channel && a.sharing != mmfast::FuseSharing::NOTHING;
  return table ? Table<typename S::Acc>::bytes(a) : 0;
}

template <class T>
void fuse_sum(const void* parts, int64_t slots, int64_t stride, int64_t count, void* out,
              mmfast::DType dtype) {
  WithStore<T>::call(dtype, [&](auto s) MMFAST_LAMBDA {
    using S = decltype(s);
    auto* to = static_cast<typename S::Bits*>(out);
    sum_slots(static_cast<const T*>(parts), slots, stride, count,
              [&](auto at, int64_t c, Vec<T> sum)
                  MMFAST_LAMBDA { at.template store<S>(to + c, sum); });
  });
}

template <class S>
constexpr mmfast::FuseKernels fuse_kernels() {
  return {fuse_scratch<S>, fuse_fwd<S>, fuse_bwd<S>, fuse_sum<typename S::Acc>};
}
constexpr mmfast::FuseTable fuse_table() {
  return {fuse_kernels<StoreF32>(), fuse_kernels<StoreBF16>(), fuse_kernels<StoreF16>(),
          fuse_kernels<StoreF64>()};
}

}  // namespace
