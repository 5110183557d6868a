// modulate on a GPU: what the binding gives and the kernels take. Plain C++.
//
// Operands are [n0, n1, columns], dense in their columns. What broadcasts has stride 0 in that dim;
// weight and bias have both. Data has one dtype (f32, bf16 or f16), the others that or f32.
#pragma once
#include "row_teams.h"
#include "stream.h"

namespace mmfast {

struct ModulateFwdArgs {
  RowShape shape;
  RowNorm norm = RowNorm::NONE;
  float eps = 0;
  RowOperand x, residual, gate, scale, shift, weight, bias;  // all but x may be absent
  RowOperand out, h;                                         // h: with a residual
};

void modulate_fwd(const ModulateFwdArgs&, const Stream&);

// The gradient of a side tensor is summed over the dims in which its stride is 0 and the shape's
// size is not 1. A null result is not wanted.
struct ModulateBwdArgs {
  RowShape shape;
  RowNorm norm = RowNorm::NONE;
  float eps = 0;
  RowOperand x, h;      // h: what was normalised; x itself without a residual
  RowOperand dout, dh;  // one may be absent: it counts as 0
  RowOperand gate, scale, weight, bias;
  RowOperand dx, dresidual, dgate, dscale, dshift, dweight, dbias;
};

int64_t modulate_bwd_workspace(const ModulateBwdArgs&);  // bytes
void modulate_bwd(const ModulateBwdArgs&, void* workspace, const Stream&);

}  // namespace mmfast
