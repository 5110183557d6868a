// What the binding and the CUDA launchers of glu agree on: out = act(a) * b. glu_packed is the same
// op with a and b in the two halves of one tensor's rows. Plain C++17.
#pragma once
#include "row_tiles.h"
#include "stream.h"

namespace mmfast {

struct GluLaunch {
  RowShape shape;
  DType dtype = DType::F32;
  int32_t activation = 0;  // 0 silu, 1 gelu (erf), 2 gelu_tanh, 3 relu, 4 sigmoid, 5 identity
  RowOperand a, b, out;
  RowOperand dout, da, db;  // backward
  RowTiles tiles;
};

struct GluCuda {
  void (*fwd)(GluLaunch&, const Stream&);
  void (*bwd)(GluLaunch&, const Stream&);
};
extern const GluCuda glu_cuda_f32, glu_cuda_bf16, glu_cuda_f16;  // by storage

}  // namespace mmfast
