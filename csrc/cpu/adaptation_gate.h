// What the bindings and the CPU kernels of adaptation_gate agree on: raw pointers, strides in
// elements, and the plan that forward and backward follow.
#pragma once
#include "rows.h"

namespace mmfast {

// A task is a chunk of the rows, in order.
struct AdaptationGateArgs {
  RowShape shape;
  int64_t chunk_rows = 0, chunks = 0;
  double beta = 1, eps = 0;
  RowOperand z, h;
  RowOperand row_mask;       // bytes, 0 = no displacement; null = every row is displaced
  RowOperand weight, bias;   // [C]: both row strides are 0
  bool past_caches = false;  // results are written past them

  RowOperand out;

  // Backward. A null result is not wanted.
  RowOperand dout, dz, dh, dweight, dbias;
  // Sums over the rows of each task, [chunks, sum_stride] in the compute type: of dout * n, n being
  // the normalised row, and of dout. Null where neither dweight nor dbias is wanted.
  void *sum_d_n = nullptr, *sum_d = nullptr;
  int64_t sum_stride = 0;
};

// Columns that a task of the second pass sums.
constexpr int64_t kAdaptationGateColumns = 128;

struct AdaptationGateKernels {
  int64_t (*fwd_scratch)(const AdaptationGateArgs&);  // bytes that a thread needs
  void (*fwd)(const AdaptationGateArgs&, int64_t task, void* scratch);
  int64_t (*bwd_scratch)(const AdaptationGateArgs&);
  void (*bwd)(const AdaptationGateArgs&, int64_t task, void* scratch);
  void (*bwd_columns)(const AdaptationGateArgs&, int64_t task);  // the second pass
};

struct AdaptationGateTable {
  AdaptationGateKernels f32, bf16, f16, f64;  // by storage
};

extern const AdaptationGateTable adaptation_gate_generic;
#if defined(__x86_64__)
extern const AdaptationGateTable adaptation_gate_avx2;
extern const AdaptationGateTable adaptation_gate_avx512;
extern const AdaptationGateKernels
    adaptation_gate_avx512_bf16;  // for bf16, with the processor's own rounding to it
#endif

}  // namespace mmfast
