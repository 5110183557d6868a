// What a binding of CUDA kernels does around a launch: every tensor on one device, results and
// workspaces there, that device current, and its stream. In the test library that runs the kernels
// on the host (MMFAST_HOST_RUN) all of it is the CPU's.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "rows.h"
#include "tensor.h"

#if defined(MMFAST_HOST_RUN)
#include "../host/control.h"
#else
#include "../cuda/limits.h"
// Weak: a CPU build of torch has no such function, and the library loads there as well.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace mmfast {

inline std::string place_name(const Place& at) {
  if (at.is_cpu()) return "cpu";
  if (at.type == int32_t(torch::headeronly::DeviceType::CUDA))
    return "cuda:" + std::to_string(at.index);
  return "a device of another kind";
}

// One call of an op on CUDA tensors. Made of the first tensor; while it lives, that tensor's device
// is the current one: for torch, and for the CUDA runtime that is linked into this library, which
// works on the context that is bound to the thread.
//
//   CudaCall call("glu", "a", a);
//   call.takes("b", b);
//   Tensor out = empty_rows_like(a, call.place());
//   glu_fwd(args, call.stream());
class CudaCall {
 public:
  CudaCall(const char* op, const char* name, const Tensor& first)
      : op_(op), name_(name), place_(place_of(first)) {
    check_place();
    check_dtype(name, first);
#if !defined(MMFAST_HOST_RUN)
    if (torch::stable::accelerator::getCurrentDeviceIndex() != place_.index)
      guard_.emplace(place_.index);
#endif
  }
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

  // Throws unless `t` is where the first tensor is.
  void takes(const char* name, const Tensor& t) const {
    const Place at = place_of(t);
    if (at == place_) return;
    fail(std::string(name) + " is on " + place_name(at) + " but " + name_ + " is on " +
         place_name(place_) + "; move it with " + name + ".to(" + name_ + ".device)");
  }
  void takes(const char* name, const OptionalTensor& t) const {
    if (t.has_value()) takes(name, *t);
  }
  void takes(const char* name, const std::vector<Tensor>& tensors) const {
    for (const Tensor& t : tensors) takes(name, t);
  }
  void require(bool condition, const char* what) const {
    if (!condition) fail(what);
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(std::string("mmfast::") + op_ + ": " + what);
  }

  const Place& place() const { return place_; }

  // The device's current stream, with what launchers choose by. Asked for once the work is known
  // to be there: an empty tensor needs no driver.
  Stream stream() const {
#if defined(MMFAST_HOST_RUN)
    return host::pretended_stream();
#else
    Stream stream;
    stream.device = place_.index;
    if (aoti_torch_get_current_cuda_stream == nullptr)
      fail("this torch has no CUDA streams although " + std::string(name_) + " is on " +
           place_name(place_) + "; install a CUDA build of torch");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place_.index, &stream.handle));
    read_limits(stream);
    return stream;
#endif
  }

  // ---- memory on the device ----

  template <size_t RANK>
  Tensor empty(const std::array<int64_t, RANK>& sizes, DType dtype) const {
    return empty_at<RANK>(place_, sizes, dtype);
  }
  Tensor nothing(DType dtype) const { return empty<1>({0}, dtype); }

  // Memory of the call, in bytes; at least 64 aligned. Kept by the tensor: hold it until the
  // launch, after which torch's allocator lets nobody but this stream have it.
  Tensor workspace(int64_t bytes) const { return empty<1>({(bytes + 3) / 4}, DType::F32); }

  // Of a contiguous tensor, on the stream.
  void zero(const Tensor& t) const {
    if (t.numel() > 0) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.get()));
  }

 private:
  void check_place() const {
#if defined(MMFAST_HOST_RUN)
    require(place_.is_cpu(), "the host run takes CPU tensors");
#else
    require(place_.type == int32_t(torch::headeronly::DeviceType::CUDA),
            "this implementation takes CUDA tensors");
#endif
  }
  void check_dtype(const char* name, const Tensor& t) const {
    switch (t.scalar_type()) {
      case ScalarType::Float:
      case ScalarType::BFloat16:
      case ScalarType::Half:
        return;
      default:
        fail(std::string(name) + " must be float32, bfloat16 or float16 on a GPU");
    }
  }

  const char* op_;
  const char* name_;
  Place place_;
#if !defined(MMFAST_HOST_RUN)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

// Data [n0, n1, columns] of a row-wise op, in its storage.
inline RowOperand row_data(const CudaCall& call, const char* name, const Tensor& t,
                           const RowShape& shape, DType storage) {
  call.takes(name, t);
  call.require(t.dim() == 3 && dtype_of(t) == storage, "data must be [B, N, C] of one dtype");
  const RowShape s = row_shape(t);
  call.require(s.n0 == shape.n0 && s.n1 == shape.n1 && s.columns == shape.columns,
               "data must have one shape");
  call.require(s.columns <= 1 || t.numel() == 0 || t.strides()[2] == 1,
               "the last dim of data must be dense");
  return row_data(t);
}

}  // namespace mmfast
