// Where the CUDA implementations of the torch ops are registered. One source, two homes: in the
// library that ships, torch.ops.mmfast_cuda for CUDA tensors; in the test library that runs the
// kernels on the host (MMFAST_HOST_RUN), torch.ops.mmfast_host for CPU tensors. Op names and
// schemas (schemas.h) are those of torch.ops.mmfast. In a file, at namespace scope:
//
//   MMFAST_CUDA_LIBRARY(m) { m.def(mmfast::schemas::kGluFwd); }
//   MMFAST_CUDA_IMPL(m) { m.impl("glu_fwd", TORCH_BOX(&mmfast::glu_fwd)); }
#pragma once
#include <torch/csrc/stable/library.h>

#include "schemas.h"

#if defined(MMFAST_HOST_RUN)
// A second copy of the library in one process (a fault planted in it) needs a name of its own.
#if !defined(MMFAST_HOST_NAMESPACE)
#define MMFAST_HOST_NAMESPACE mmfast_host
#endif
#define MMFAST_CUDA_NAMESPACE MMFAST_HOST_NAMESPACE
#define MMFAST_CUDA_KEY CPU
#else
#define MMFAST_CUDA_NAMESPACE mmfast_cuda
#define MMFAST_CUDA_KEY CUDA
#endif

// The indirection lets the two names above be replaced before torch's macros make text of them.
#define MMFAST_REGISTER_LIBRARY(name, m) STABLE_TORCH_LIBRARY_FRAGMENT(name, m)
#define MMFAST_REGISTER_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
#define MMFAST_CUDA_LIBRARY(m) MMFAST_REGISTER_LIBRARY(MMFAST_CUDA_NAMESPACE, m)
#define MMFAST_CUDA_IMPL(m) MMFAST_REGISTER_IMPL(MMFAST_CUDA_NAMESPACE, MMFAST_CUDA_KEY, m)
