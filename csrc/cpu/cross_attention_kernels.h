// Gathers the passes of cross_attention into the table of one instruction set.
#pragma once
#include "cross_attention_bwd_dbias.h"
#include "cross_attention_bwd_gate.h"
#include "cross_attention_few.h"
#include "cross_attention_shared_bwd.h"

namespace {

// The passes that have kernels of their own where the keys are the values.
template <class C>
int64_t fwd_pass_tasks(const CrossAttentionArgs& a) {
  return a.shared_kv ? shared_fwd_tasks<C>(a) : any_fwd_tasks<C>(a);
}
template <class C>
int64_t fwd_pass_scratch(const CrossAttentionArgs& a) {
  return a.shared_kv ? shared_fwd_scratch<C>(a) : any_fwd_scratch<C>(a);
}
template <class C>
void fwd_pass_run(const CrossAttentionArgs& a, int64_t task, void* scratch) {
  if (a.shared_kv)
    shared_fwd_run<C>(a, task, scratch);
  else
    any_fwd_run<C>(a, task, scratch);
}
template <class C>
int64_t bwd_pass_tasks(const CrossAttentionArgs& a) {
  return a.shared_kv ? shared_bwd_tasks<C>(a) : any_bwd_tasks<C>(a);
}
template <class C>
int64_t bwd_pass_scratch(const CrossAttentionArgs& a) {
  return a.shared_kv ? shared_bwd_scratch<C>(a) : any_bwd_scratch<C>(a);
}
template <class C>
void bwd_pass_run(const CrossAttentionArgs& a, int64_t task, void* scratch) {
  if (a.shared_kv)
    shared_bwd_run<C>(a, task, scratch);
  else
    any_bwd_run<C>(a, task, scratch);
}

template <class C>
constexpr mmfast::CrossAttentionKernels kernels_of() {
  return {{fwd_pass_tasks<C>, fwd_pass_scratch<C>, fwd_pass_run<C>},
          {shared_merge_tasks<C>, shared_merge_scratch<C>, shared_merge_run<C>},
          {importance_tasks<C>, probs_scratch<C>, importance_run<C>},
          {weights_tasks<C>, probs_scratch<C>, weights_run<C>},
          {bwd_rows_tasks<C>, bwd_rows_scratch<C>, bwd_rows_run<C>},
          {bwd_pass_tasks<C>, bwd_pass_scratch<C>, bwd_pass_run<C>},
          {bwd_dq_tasks<C>, bwd_dq_scratch<C>, bwd_dq_run<C>},
          {bwd_dbias_tasks<C>, bwd_scratch<C>, bwd_dbias_run<C>}};
}

}  // namespace
