// adaptation_gate on a GPU: what the binding gives and the kernels take. Plain C++.
//
// Operands are [n0, n1, columns], dense in their columns, of one dtype (f32, bf16 or f16). weight
// and bias are [columns], of that dtype or f32; row_mask has a byte for each row.
#pragma once
#include "row_teams.h"
#include "stream.h"

namespace mmfast {

struct AdaptationGateFwdArgs {
  RowShape shape;
  float beta = 1, eps = 0;
  RowOperand z, h;
  RowOperand weight, bias, row_mask;  // may be absent
  RowOperand out;
};

void adaptation_gate_fwd(const AdaptationGateFwdArgs&, const Stream&);

// A null result is not wanted.
struct AdaptationGateBwdArgs {
  RowShape shape;
  float beta = 1, eps = 0;
  RowOperand z, h, dout;
  RowOperand weight, row_mask;
  RowOperand dz, dh, dweight, dbias;
};

int64_t adaptation_gate_bwd_workspace(const AdaptationGateBwdArgs&);  // bytes
void adaptation_gate_bwd(const AdaptationGateBwdArgs&, void* workspace, const Stream&);

}  // namespace mmfast
