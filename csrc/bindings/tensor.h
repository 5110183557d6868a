// Tensors through torch's stable C interface: what the op registrations read and make. The only
// torch headers of the library are included here and in the registration files.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "../common/strided.h"

namespace mmfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::F32;
    case ScalarType::BFloat16:
      return DType::BF16;
    case ScalarType::Half:
      return DType::F16;
    case ScalarType::Double:
      return DType::F64;
    default:
      throw std::runtime_error("mmfast: a tensor has a dtype that no kernel takes");
  }
}

inline int32_t torch_dtype(DType t) {
  switch (t) {
    case DType::F32:
      return int32_t(ScalarType::Float);
    case DType::BF16:
      return int32_t(ScalarType::BFloat16);
    case DType::F16:
      return int32_t(ScalarType::Half);
    case DType::F64:
      break;
  }
  return int32_t(ScalarType::Double);
}

inline DType accumulate_dtype(DType storage) {
  return storage == DType::F64 ? DType::F64 : DType::F32;
}

// Large new memory in huge pages where the system leaves that to programs (as numpy asks for its
// arrays): the first touch of 4 KiB pages is what limits an op that streams. Measured on a Zen 4
// guest: copying into new memory 4.0 GB/s, with huge pages 11 GB/s (both counting reads and
// writes). It only ever takes whole huge pages inside the range, so it takes no more memory.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kWorthIt = int64_t(4) << 20;
  if (bytes < kWorthIt) return;
  constexpr uintptr_t kPage = 4096;
  const uintptr_t from = (uintptr_t(data) + kPage - 1) / kPage * kPage;
  const uintptr_t to = (uintptr_t(data) + uintptr_t(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a hint: it may say no
#else
  (void)data, (void)bytes;
#endif
}

// What is done to new memory on the CPU before a kernel gets it.
inline void fresh_memory(void* data, int64_t bytes) {
#if defined(MMFAST_HOST_RUN)
  std::memset(data, 0xff, size_t(bytes));  // NaN in every dtype: an element never written shows
#else
  prefer_huge_pages(data, bytes);
#endif
}

// Where a tensor's memory is, as torch's C interface names it.
struct Place {
  int32_t type, index;
  bool is_cpu() const { return type == kCpuType; }
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
  static constexpr int32_t kCpuType = int32_t(torch::headeronly::DeviceType::CPU);
};

constexpr Place kOnCpu = {Place::kCpuType, 0};

inline Place place_of(const Tensor& t) {
  Place at;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &at.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &at.index));
  if (at.is_cpu()) at.index = 0;  // torch's own -1
  return at;
}

template <size_t RANK>
Tensor empty_strided_at(const Place& at, const std::array<int64_t, RANK>& sizes,
                        const std::array<int64_t, RANK>& strides, DType dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(RANK), sizes.data(), strides.data(), torch_dtype(dtype), at.type, at.index, &handle));
  Tensor made(handle);
  if (!at.is_cpu()) return made;
  int64_t bytes = dtype_bytes(dtype);
  for (const int64_t size : sizes) bytes *= size;
  if (bytes > 0) fresh_memory(made.data_ptr(), bytes);
  return made;
}

template <size_t RANK>
Tensor empty_at(const Place& at, const std::array<int64_t, RANK>& sizes, DType dtype) {
  std::array<int64_t, RANK> strides;
  int64_t stride = 1;
  for (size_t i = RANK; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty_strided_at(at, sizes, strides, dtype);
}

template <size_t RANK>
Tensor empty_cpu(const std::array<int64_t, RANK>& sizes, DType dtype) {
  return empty_at(kOnCpu, sizes, dtype);
}

// Of a contiguous tensor on the CPU.
inline void fill_zero(const Tensor& t) {
  if (t.numel() > 0) std::memset(t.data_ptr(), 0, size_t(t.numel()) * t.element_size());
}

// [B, H, N, width]; in memory [B, N, H, width] where `like` has its rows before its heads.
inline Tensor empty_following(const Tensor& like, int64_t width, const Place& at = kOnCpu) {
  const auto sizes = like.sizes();
  const auto strides = like.strides();
  const int64_t B = sizes[0], H = sizes[1], N = sizes[2];
  const bool rows_first = strides[1] < strides[2];
  const auto least = [](int64_t x) { return x > 0 ? x : 1; };
  const int64_t w = least(width);
  const std::array<int64_t, 4> made =
      rows_first ? std::array<int64_t, 4>{least(N) * least(H) * w, w, least(H) * w, 1}
                 : std::array<int64_t, 4>{least(H) * least(N) * w, least(N) * w, w, 1};
  return empty_strided_at<4>(at, {B, H, N, width}, made, dtype_of(like));
}

// Packed, `[1, H, rows, :]`, where `starts` are given.
inline Strided strided(const Tensor& t, const int32_t* starts = nullptr) {
  const auto strides = t.strides();
  return {t.data_ptr(), starts == nullptr ? strides[0] : 0, strides[1], strides[2], dtype_of(t),
          starts};
}

inline int64_t stride_or_zero(const Tensor& t, int64_t dim) {
  return t.sizes()[dim] == 1 ? 0 : t.strides()[dim];
}

// [B or 1, H or 1, N or 1, M or 1]
inline Broadcast broadcast(const Tensor& t, DType dtype) {
  return {t.data_ptr(),         stride_or_zero(t, 0), stride_or_zero(t, 1),
          stride_or_zero(t, 2), stride_or_zero(t, 3), dtype};
}

}  // namespace mmfast
