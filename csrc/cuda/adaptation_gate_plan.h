// What the launchers of adaptation_gate decide and its kernels follow. Plain C++.
#pragma once
#include "adaptation_gate.h"

namespace mmfast {

// Elements of z and of h that a lane holds.
constexpr int kAdaptationHeld = 16;
constexpr int kAdaptationHeldBwd = 8;

struct AdaptationGateFwdPlan : AdaptationGateFwdArgs {
  RowTeams teams;
  int32_t steps = 1;  // rows of a team
};

// What the backward needs of a row that does not fit a team's registers.
struct AdaptationStats {
  float alpha, of_z, of_h;  // dz gets of_z * z, dh gets of_h * h, beside what comes through y
  float centre, rstd, offset;
  float mean, mean_n;  // of g = dout * weight, and of g * n
};

struct AdaptationGateBwdPlan : AdaptationGateBwdArgs {
  RowTeams teams;
  int64_t chunk_rows = 0, chunks = 0;
  RowOperand sum_weight, sum_bias;  // of chunks, s0 apart
  // Which place of a block's sums holds that of dout * n and of dout; -1: it is not needed.
  int32_t at_weight = -1, at_bias = -1, sums = 0;
  AdaptationStats* stats = nullptr;  // [rows]
};

// One storage each (adaptation_gate_<dtype>.cu). wide: accesses of 16 bytes.
template <class T>
void launch_adaptation_gate_fwd(const AdaptationGateFwdPlan&, bool wide, const Stream&);
template <class T>
void launch_adaptation_gate_bwd(const AdaptationGateBwdPlan&, bool wide, const Stream&);

}  // namespace mmfast
