// What the bindings and the CPU kernels of modulate agree on: raw pointers, strides in elements,
// and the plan that forward and backward follow.
#pragma once
#include "rows.h"

namespace mmfast {

enum ModulateNorm : int { kNormNone = 0, kNormLayer, kNormRms };

// Rows are numbered over (n0, n1) and come in groups: all of them, or those of an item where a side
// tensor belongs to the item. Within a group a side tensor is the same for every row or `by_row`.
// A task is a chunk of the rows of one group.
struct ModulateArgs {
  RowShape shape;
  int64_t groups = 0, group_rows = 0, chunk_rows = 0, chunks = 0;
  int norm = kNormNone;
  double eps = 0;
  RowOperand x, residual, gate, scale, shift;
  RowOperand weight, bias;  // [C]: both row strides are 0
  bool gate_by_row = false, scale_by_row = false, shift_by_row = false;
  bool past_caches = false;  // results are written past them

  RowOperand out;
  RowOperand h;  // with a residual: a result of the forward; in the backward what was normalised

  // Backward. A null result is not wanted. Gradients of side tensors that are by_row are written
  // row by row; the others are made of sums over rows, [groups, chunks, sum_stride] in the compute
  // type, by the second pass.
  bool residual_given = false;
  RowOperand dout, dh;
  RowOperand dx, dresidual, dgate, dscale, dshift, dweight, dbias;
  void* sum_d_n = nullptr;   // of d * n: d is dout, or dout * (1 + scale) where scale is by_row
  void* sum_d = nullptr;     // of d
  void* sum_dout = nullptr;  // of dout, where shift is not by_row and scale is
  void* sum_gate = nullptr;  // of (the gradient of h) * x
  int64_t sum_stride = 0;
  bool row_results() const {
    return dx.data != nullptr || dresidual.data != nullptr || dgate.data != nullptr;
  }
};

// Columns that a task of the second pass sums.
constexpr int64_t kModulateColumns = 128;

struct ModulateKernels {
  int64_t (*fwd_scratch)(const ModulateArgs&);  // bytes that a thread needs
  void (*fwd)(const ModulateArgs&, int64_t task, void* scratch);
  int64_t (*bwd_scratch)(const ModulateArgs&);
  void (*bwd)(const ModulateArgs&, int64_t task, void* scratch);
  void (*bwd_columns)(const ModulateArgs&, int64_t task);  // the second pass
  // out[i] = sum over items of parts[item * stride + i], i < count: a side tensor that has rows and
  // that items share.
  void (*sum_items)(const void* parts, int64_t items, int64_t stride, int64_t count, void* out,
                    DType dtype);
};

struct ModulateTable {
  ModulateKernels f32, bf16, f16, f64;  // by storage
};

extern const ModulateTable modulate_generic;
#if defined(__x86_64__)
extern const ModulateTable modulate_avx2;
extern const ModulateTable modulate_avx512;
extern const ModulateKernels
    modulate_avx512_bf16;  // for bf16, with the processor's own rounding to it
#endif

}  // namespace mmfast
