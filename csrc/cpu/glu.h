// What the bindings and the CPU kernels of glu agree on: out = act(a) * b. glu_packed is the same
// op with a and b in the two halves of one tensor's rows.
#pragma once
#include "rows.h"

namespace mmfast {

struct GluArgs {
  RowShape shape;
  RowTasks tasks;
  DType dtype = DType::F32;
  int activation = 0;     // 0 silu, 1 gelu (erf), 2 gelu_tanh, 3 relu, 4 sigmoid, 5 identity
  bool streamed = false;  // results go past the caches
  RowOperand a, b, out;
  RowOperand dout, da, db;  // backward
};
constexpr int kGluActivations = 6;

struct GluKernels {
  void (*fwd)(const GluArgs&, int64_t task);
  void (*bwd)(const GluArgs&, int64_t task);
};

extern const GluKernels glu_generic;
#if defined(__x86_64__)
extern const GluKernels glu_avx2;
extern const GluKernels glu_avx512;
#endif

}  // namespace mmfast
