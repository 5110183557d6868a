// What the binding and the CUDA launchers of gated_residual agree on:
// out = x + row_mask * act(gate) * y. Plain C++17.
#pragma once
#include "row_tiles.h"
#include "stream.h"

namespace mmfast {

// What the gradient of the gate is, which is how rows are dealt to blocks.
enum class GateGradient : int32_t {
  ELEMENTS,  // like the data, or not wanted
  ROWS,      // one gate a row: sums over its columns
  SUMS       // rows of an item i0 share a gate: sums over rows, and where sc = 0 over columns too
};

struct GatedResidualLaunch {
  RowShape shape;
  DType dtype = DType::F32;  // of the data; the gate's may be F32
  int32_t activation = 0;    // 0 tanh, 1 sigmoid, 2 identity
  RowOperand x, y, out, gate, mask;
  RowOperand dout, dy, dgate;  // backward; data null = not wanted
  GateGradient gradient = GateGradient::ELEMENTS;
  // SUMS: [n0 * tiles_n, columns], or [n0 * tiles_n * tiles_c] where the gate has no channels.
  float* parts = nullptr;
  RowTiles tiles;
};

// Chooses the tiles, before a launch.
inline void plan_gated_residual_fwd(GatedResidualLaunch& a) {
  const bool wide = wide_access(a.shape, {&a.x, &a.y, &a.out, &a.gate});
  a.tiles = element_tiles(a.shape, a.dtype, wide);
}
inline void plan_gated_residual_bwd(GatedResidualLaunch& a) {
  const bool wide = wide_access(a.shape, {&a.dout, &a.y, &a.dy, &a.gate, &a.dgate});
  a.tiles = a.gradient == GateGradient::SUMS   ? sum_tiles(a.shape, a.dtype, wide)
            : a.gradient == GateGradient::ROWS ? team_tiles(a.shape, a.dtype, wide)
                                               : element_tiles(a.shape, a.dtype, wide);
}
// Rows of `parts` that belong to one item, and columns of each.
inline int64_t gated_residual_parts(const GatedResidualLaunch& a) {
  return a.gate.sc != 0 ? a.tiles.tiles_n : int64_t(a.tiles.tiles_n) * a.tiles.tiles_c;
}
inline int64_t gated_residual_width(const GatedResidualLaunch& a) {
  return a.gate.sc != 0 ? a.shape.columns : 1;
}

struct GatedResidualCuda {
  void (*fwd)(const GatedResidualLaunch&, const Stream&);
  void (*bwd)(const GatedResidualLaunch&,
              const Stream&);  // with SUMS, `parts` is still to be added
};
extern const GatedResidualCuda gated_residual_cuda_f32, gated_residual_cuda_bf16,
    gated_residual_cuda_f16;  // by storage of the data

}  // namespace mmfast
