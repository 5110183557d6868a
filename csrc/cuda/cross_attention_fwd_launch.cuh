// From a plan to an instance: what the .cu files of the forward instantiate.
#pragma once
#include "cross_attention_fwd.cuh"

namespace mmfast {

template <class F>
void launch_fwd(const FwdPlan& plan, const FwdArgs& args, const Stream& stream) {
  if constexpr (width_is_built(F::WIDTH)) {
    launch<cross_attention_fwd_kernel<F>>(Grid{plan.blocks}, F::THREADS, F::shared(), stream, args);
  } else {
    throw std::runtime_error("this build has no head width of " + std::to_string(F::WIDTH));
  }
}

template <class T>
void cross_attention_fwd_plain(const FwdPlan& plan, const FwdArgs& args, const Stream& stream) {
  if constexpr (sizeof(T) == 2) {
    if (plan.width == 32) return launch_fwd<FwdForm<T, 32, 1, false>>(plan, args, stream);
    if (plan.width == 96 && plan.tall)
      return launch_fwd<FwdForm<T, 96, 2, false>>(plan, args, stream);
    if (plan.width == 96) return launch_fwd<FwdForm<T, 96, 1, false>>(plan, args, stream);
    if (plan.width == 64 && plan.tall)
      return launch_fwd<FwdForm<T, 64, 2, false>>(plan, args, stream);
    if (plan.width == 128 && plan.tall)
      return launch_fwd<FwdForm<T, 128, 2, false>>(plan, args, stream);
  }
  if (plan.width == 64) return launch_fwd<FwdForm<T, 64, 1, false>>(plan, args, stream);
  if (plan.width == 128) return launch_fwd<FwdForm<T, 128, 1, false>>(plan, args, stream);
  return launch_fwd<FwdForm<T, 256, 1, false>>(plan, args, stream);
}

template <class T>
void cross_attention_fwd_full(const FwdPlan& plan, const FwdArgs& args, const Stream& stream) {
  if (plan.width == 64) return launch_fwd<FwdForm<T, 64, 1, true>>(plan, args, stream);
  if (plan.width == 128) return launch_fwd<FwdForm<T, 128, 1, true>>(plan, args, stream);
  return launch_fwd<FwdForm<T, 256, 1, true>>(plan, args, stream);
}

}  // namespace mmfast
