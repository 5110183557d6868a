// What the .cu files of cross_attention's backward instantiate: a pass over keys and one over
// queries.
#pragma once
#include "cross_attention_dkv.cuh"
#include "cross_attention_dq.cuh"

namespace mmfast {

template <class T, int WIDTH, bool FULL>
BackwardShape BackwardPasses<T, WIDTH, FULL>::keys_shape() {
  using C = KeysPass<T, WIDTH, FULL>;
  return {C::ROWS, C::KEYS, C::APART ? 2 : 1};
}

template <class T, int WIDTH, bool FULL>
BackwardShape BackwardPasses<T, WIDTH, FULL>::queries_shape() {
  using C = QueriesPass<T, WIDTH, FULL>;
  return {C::ROWS, C::KEYS, 1};
}

template <class T, int WIDTH, bool FULL>
void BackwardPasses<T, WIDTH, FULL>::keys([[maybe_unused]] const BackwardPass& pass,
                                          [[maybe_unused]] const Stream& stream) {
  if constexpr (width_is_built(WIDTH)) launch_keys<KeysPass<T, WIDTH, FULL>>(pass, stream);
}

template <class T, int WIDTH, bool FULL>
void BackwardPasses<T, WIDTH, FULL>::queries([[maybe_unused]] const BackwardPass& pass,
                                             [[maybe_unused]] const Stream& stream) {
  if constexpr (width_is_built(WIDTH)) launch_queries<QueriesPass<T, WIDTH, FULL>>(pass, stream);
}

}  // namespace mmfast
