// Gathers the passes of modulate into the table of one instruction set.
#pragma once
#include "modulate_bwd.h"
#include "modulate_columns.h"

namespace {

template <class S>
constexpr mmfast::ModulateKernels modulate_kernels() {
  return {modulate_fwd_scratch<S>, modulate_fwd<S>,         modulate_bwd_scratch<S>,
          modulate_bwd<S>,         modulate_bwd_columns<S>, modulate_sum_items<typename S::Acc>};
}

constexpr mmfast::ModulateTable modulate_table() {
  return {modulate_kernels<StoreF32>(), modulate_kernels<StoreBF16>(), modulate_kernels<StoreF16>(),
          modulate_kernels<StoreF64>()};
}

}  // namespace
