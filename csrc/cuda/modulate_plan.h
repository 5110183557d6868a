// What the launchers of modulate decide and its kernels follow. Plain C++.
#pragma once
#include "modulate.h"

namespace mmfast {

// Elements that a lane holds of a row: forward, and backward beside its sums.
constexpr int kModulateHeld = 16;
constexpr int kModulateHeldBwd = 8;
constexpr int kModulateStats = 5;

struct ModulateFwdPlan : ModulateFwdArgs {
  RowTeams teams;
  int32_t steps = 1;  // rows of a team
};

struct ModulateBwdPlan : ModulateBwdArgs {
  RowTeams teams;
  int64_t groups = 1, group_rows = 0;  // rows that share every sum, in order
  int64_t chunk_rows = 0, chunks = 0;  // of a group
  bool scale_by_row = false;           // the rows of a chunk differ in scale
  // Of chunks, s0 apart; null where the gradient is written row by row or not wanted.
  RowOperand sum_gate, sum_scale, sum_shift, sum_weight, sum_bias;
  // Which place of a block's sums holds that of what; -1: it is not needed. d is dout, or
  // dout * (1 + scale) where scale is by row.
  int32_t at_gate = -1, at_dout = -1, at_d = -1, at_d_n = -1, sums = 0;
  float* stats = nullptr;  // [rows, kModulateStats]: moments, mean(d), mean(d * n)
};

// One storage each (modulate_<dtype>.cu). wide: accesses of 16 bytes.
template <class T>
void launch_modulate_fwd(const ModulateFwdPlan&, bool wide, const Stream&);
template <class T>
void launch_modulate_bwd(const ModulateBwdPlan&, bool wide, const Stream&);

}  // namespace mmfast
