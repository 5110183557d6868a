// One storage type and head width of cross_attention's backward: what its .cu files instantiate.
#pragma once
#include "cross_attention_dkv.cuh"
#include "cross_attention_dq.cuh"

namespace mmfast {

template <class T, int WIDTH>
constexpr bool kPlain = sizeof(T) == 2 && WIDTH <= 128;

template <class T, int WIDTH>
BackwardShape BackwardPasses<T, WIDTH>::keys_shape(bool full) {
  if (full || !kPlain<T, WIDTH>) return shape_of_keys<KeysPass<T, WIDTH, true>>();
  return shape_of_keys<KeysPass<T, WIDTH, !kPlain<T, WIDTH>>>();
}

template <class T, int WIDTH>
BackwardShape BackwardPasses<T, WIDTH>::queries_shape(bool full) {
  if (full || !kPlain<T, WIDTH>) return shape_of_queries<QueriesPass<T, WIDTH, true>>();
  return shape_of_queries<QueriesPass<T, WIDTH, !kPlain<T, WIDTH>>>();
}

template <class T, int WIDTH>
void BackwardPasses<T, WIDTH>::keys(const BackwardPass& pass, const Stream& stream) {
  if (pass.full || !kPlain<T, WIDTH>)
    launch_keys<KeysPass<T, WIDTH, true>>(pass, stream);
  else
    launch_keys<KeysPass<T, WIDTH, !kPlain<T, WIDTH>>>(pass, stream);
}

template <class T, int WIDTH>
void BackwardPasses<T, WIDTH>::queries(const BackwardPass& pass, const Stream& stream) {
  if (pass.full || !kPlain<T, WIDTH>)
    launch_queries<QueriesPass<T, WIDTH, true>>(pass, stream);
  else
    launch_queries<QueriesPass<T, WIDTH, !kPlain<T, WIDTH>>>(pass, stream);
}

}  // namespace mmfast
