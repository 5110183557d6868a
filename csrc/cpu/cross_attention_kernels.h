// Gathers the passes of cross_attention into the table of one instruction set.
#pragma once
#include "cross_attention_bwd_dbias.h"
#include "cross_attention_bwd_gate.h"
#include "cross_attention_few.h"

namespace {

template <class C>
constexpr mmfast::CrossAttentionKernels kernels_of() {
  return {{any_fwd_tasks<C>, any_fwd_scratch<C>, any_fwd_run<C>},
          {importance_tasks<C>, probs_scratch<C>, importance_run<C>},
          {weights_tasks<C>, probs_scratch<C>, weights_run<C>},
          {bwd_rows_tasks<C>, bwd_rows_scratch<C>, bwd_rows_run<C>},
          {any_bwd_tasks<C>, any_bwd_scratch<C>, any_bwd_run<C>},
          {bwd_dq_tasks<C>, bwd_dq_scratch<C>, bwd_dq_run<C>},
          {bwd_dbias_tasks<C>, bwd_scratch<C>, bwd_dbias_run<C>}};
}

}  // namespace
