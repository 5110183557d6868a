// Tensors [B, H, N, :] of attention as kernels see them: raw pointers, strides in elements.
#pragma once
#include <stdint.h>

#include "dtype.h"

namespace mmfast {

// `starts` (null = none) is where each item's rows begin in a packed tensor, in which the rows of
// all items lie one after the other: item b then begins at row starts[b], and sb counts for
// nothing.
struct Strided {  // element (b, h, n, :) at data + offset(b, h, n); the last dim has stride 1
  void* data = nullptr;
  int64_t sb = 0, sh = 0, sn = 0;
  DType dtype = DType::F32;
  const int32_t* starts = nullptr;
  int64_t offset(int64_t b, int64_t h, int64_t n) const {
    return (starts != nullptr ? starts[b] * sn : b * sb) + h * sh + n * sn;
  }
};

struct Broadcast {  // element (b, h, n, m); a stride of 0 is a broadcast dim; data null = absent
  void* data = nullptr;
  int64_t sb = 0, sh = 0, sn = 0, sm = 0;
  DType dtype = DType::F32;
  const int32_t* starts = nullptr;
  int64_t offset(int64_t b, int64_t h, int64_t n) const {
    return (starts != nullptr ? starts[b] * sn : b * sb) + h * sh + n * sn;
  }
};

}  // namespace mmfast
