// What the bindings and the CPU kernels of gated_residual agree on:
// out = x + row_mask * act(gate) * y.
#pragma once
#include "rows.h"

namespace mmfast {

struct GatedResidualArgs {
  RowShape shape;
  RowTasks tasks;  // of the elementwise passes
  DType dtype = DType::F32;
  int activation = 0;     // 0 tanh, 1 sigmoid, 2 identity
  bool streamed = false;  // results go past the caches
  RowOperand x, y, out, gate, mask;
  RowOperand dout, dy, dgate;  // backward; data null = not needed

  // The gate's gradient where it is a sum: rows [group * reduced, (group + 1) * reduced) belong to
  // one group of the result. A group is cut into chunks, or several small groups are one task.
  int64_t groups = 0, reduced = 1;
  int64_t groups_each = 1, chunks = 1, rows_each = 1, columns_each = 1, column_tasks = 1;
  int64_t slots = 1;      // partial sums of a group; 1 = the task writes the gradient itself
  void* parts = nullptr;  // [groups, slots, width] in the compute type
  int64_t width() const { return gate.sc != 0 ? shape.columns : 1; }
  int64_t sum_tasks() const {
    return (groups + groups_each - 1) / groups_each * chunks * column_tasks;
  }
};
constexpr int kGateActivations = 3;
// Columns of a task that adds up the partial sums.
constexpr int64_t kFinishColumns = 1024;

struct GatedResidualKernels {
  using Run = void (*)(const GatedResidualArgs&, int64_t task, void* scratch);
  Run fwd;
  Run bwd_dy;      // without the gate's gradient
  Run bwd_full;    // a gate like x: its gradient is elementwise
  Run bwd_sums;    // a gate that broadcasts: partial sums, or the sums themselves
  Run bwd_finish;  // partial sums -> the gate's gradient
};

extern const GatedResidualKernels gated_residual_generic;
#if defined(__x86_64__)
extern const GatedResidualKernels gated_residual_avx2;
extern const GatedResidualKernels gated_residual_avx512;
#endif

}  // namespace mmfast
