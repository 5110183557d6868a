// Tensors [B, H, N, :] of attention as kernels see them: raw pointers, strides in elements.
#pragma once
#include <stdint.h>

#include "dtype.h"

namespace mmfast {

struct Strided {  // element (b, h, n, :) at data + b*sb + h*sh + n*sn; the last dim has stride 1
  void* data = nullptr;
  int64_t sb = 0, sh = 0, sn = 0;
  DType dtype = DType::F32;
};

struct Broadcast {  // element (b, h, n, m); a stride of 0 is a broadcast dim; data null = absent
  void* data = nullptr;
  int64_t sb = 0, sh = 0, sn = 0, sm = 0;
  DType dtype = DType::F32;
};

}  // namespace mmfast
