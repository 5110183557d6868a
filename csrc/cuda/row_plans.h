// What the plans of the normalising ops share.
#pragma once
#include <initializer_list>
#include <utility>

#include "device.cuh"
#include "row_teams.h"
#include "row_tiles.h"

namespace mmfast {

// Whole rows in accesses of 16 bytes: no piece of one is shorter.
inline bool wide_rows(const RowShape& shape, DType storage,
                      std::initializer_list<const RowOperand*> operands) {
  return shape.columns % (16 / dtype_bytes(storage)) == 0 && wide_access(shape, operands);
}

inline void swap_rows(RowShape& shape, std::initializer_list<RowOperand*> operands) {
  std::swap(shape.n0, shape.n1);
  for (RowOperand* x : operands) std::swap(x->s0, x->s1);
}

// Whether rows lie in memory by i1 first, [n1, n0, columns].
inline bool rows_first(const RowShape& shape, const RowOperand& x) {
  return shape.n0 > 1 && shape.n1 > 1 && x.s0 < x.s1;
}

// Threads of a block whose teams are smaller than it.
constexpr int32_t kForwardThreads = 128, kBackwardThreads = 256;

// Rows that a team of the forward takes one after the other, once there are more blocks than a GPU
// holds: what stands beside them is in the L1 cache then.
inline int32_t team_steps(const RowShape& shape, const RowTeams& teams) {
  constexpr int64_t kBlocks = 4096, kMost = 8;
  const int64_t steps = shape.rows() / (teams.count * kBlocks);
  return int32_t(steps < 1 ? 1 : steps < kMost ? steps : kMost);
}

template <class F>
inline void with_storage(DType dtype, const F& f) {
  if (dtype == DType::F32)
    f(float{});
  else if (dtype == DType::BF16)
    f(bf16{});
  else
    f(f16{});
}

// Hands out the floats of a workspace, 64-byte aligned.
class Workspace {
 public:
  explicit Workspace(void* memory) : first_(reinterpret_cast<uintptr_t>(memory)) {}
  // For a plan of which only the size of the workspace is asked; nobody reads or writes there.
  static void* nowhere() { return reinterpret_cast<void*>(uintptr_t(256)); }

  float* take(int64_t floats) {
    float* p = reinterpret_cast<float*>(first_ + uintptr_t(bytes()));
    taken_ += (floats + 15) / 16 * 16;
    return p;
  }
  int64_t bytes() const { return taken_ * int64_t(sizeof(float)); }

 private:
  uintptr_t first_;
  int64_t taken_ = 0;
};

}  // namespace mmfast
