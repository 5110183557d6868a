// Gathers the passes of cross_attention into the table of one instruction set.
#pragma once
#include "cross_attention_bwd.h"
#include "cross_attention_fwd.h"
#include "cross_attention_probs.h"

namespace {

template <class C>
constexpr mmfast::CrossAttentionKernels kernels_of(const char* isa) {
  return {isa,
          {fwd_tasks<C>, fwd_scratch<C>, fwd_run<C>},
          {importance_tasks<C>, probs_scratch<C>, importance_run<C>},
          {weights_tasks<C>, probs_scratch<C>, weights_run<C>},
          {bwd_rows_tasks<C>, bwd_rows_scratch<C>, bwd_rows_run<C>},
          {bwd_tasks<C>, bwd_scratch<C>, bwd_run<C>},
          {bwd_dbias_tasks<C>, bwd_scratch<C>, bwd_dbias_run<C>}};
}

}  // namespace
