// modulate, forward: out = (norm(h) * weight + bias) * (1 + scale) + shift, h = x or
// residual + gate * x rounded to storage. A team reads a row once into registers; of a row longer
// than `kModulateHeld` elements a lane each pass reads the tiles again, from the caches.
//
// Instances: storage f32, bf16, f16, each with 16-byte accesses and with single elements. Norms and
// what is absent are uniform branches: the kernel waits for memory, not for them.
#pragma once
#include "modulate_plan.h"
#include "row_norm.cuh"

namespace mmfast {

template <class T, int VEC>
struct ModulateForward {
  using Held = HeldRow<kModulateHeld, VEC>;
  static constexpr int ITEMS = Held::ITEMS;

  const ModulateFwdPlan& a;
  RowTeam<2> team;
  RowPlace at;
  bool live;

  MMFAST_DEVICE HeldColumns<VEC> columns(int64_t tile) const {
    return {tile * a.teams.tile, team.lane(), team.lanes(), a.shape.columns};
  }
  MMFAST_DEVICE void side(const RowOperand& x, int64_t c, float (&v)[VEC]) const {
    load_side<T, VEC>(x.data, x.dtype, row_offset(x, at) + c, v);
  }
  MMFAST_DEVICE const T* data(const RowOperand& x, int64_t c) const {
    return static_cast<const T*>(x.data) + row_offset(x, at) + c;
  }

  // h of a tile, zeros past the row; `keep` writes it where it is a result.
  MMFAST_DEVICE void take(int64_t tile, bool keep, Held& h) const {
    const HeldColumns<VEC> where = columns(tile);
    MMFAST_UNROLL
    for (int i = 0; i < ITEMS; ++i) {
      const int64_t c = where.at(i);
      float (&v)[VEC] = h.x[i];
      if (!live || !where.inside(i)) {
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) v[j] = 0;
        continue;
      }
      load_vector<T, VEC>(data(a.x, c), v);
      if (a.residual.data == nullptr) continue;
      if (a.gate.data != nullptr) {
        float gate[VEC];
        side(a.gate, c, gate);
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) v[j] *= gate[j];
      }
      float residual[VEC];
      load_vector<T, VEC>(data(a.residual, c), residual);
      MMFAST_UNROLL
      for (int j = 0; j < VEC; ++j) v[j] = to_float(from_float<T>(residual[j] + v[j]));
      if (keep) store_vector<T, VEC>(static_cast<T*>(a.h.data) + row_offset(a.h, at) + c, v);
    }
  }

  // f(v) for each element of the row, tile by tile. A row of one tile stays in `h`.
  template <class F>
  MMFAST_DEVICE void each(Held& h, bool first, const F& f) const {
    for (int64_t tile = 0; tile < a.teams.tiles; ++tile) {
      if (first || a.teams.tiles > 1) take(tile, first, h);
      const HeldColumns<VEC> where = columns(tile);
      MMFAST_UNROLL
      for (int i = 0; i < ITEMS; ++i)
        if (where.inside(i)) {
          MMFAST_UNROLL
          for (int j = 0; j < VEC; ++j) f(h.x[i][j]);
        }
    }
  }

  MMFAST_DEVICE RowMoments moments(Held& h) {
    if (a.norm == RowNorm::LAYER) {
      float sum[1] = {0};
      each(h, true, [&](float v) { sum[0] += v; });
      team.sum(sum);
      const float centre = sum[0] / float(a.shape.columns);
      float sums[2] = {0, 0};
      each(h, false, [&](float v) {
        const float d = v - centre;
        sums[0] += d;
        sums[1] += d * d;
      });
      team.sum(sums);
      return layer_moments(centre, sums[0], sums[1], a.shape.columns, a.eps);
    }
    if (a.norm == RowNorm::RMS) {
      float squares[1] = {0};
      each(h, true, [&](float v) { squares[0] += v * v; });
      team.sum(squares);
      return rms_moments(squares[0], a.shape.columns, a.eps);
    }
    return {};
  }

  MMFAST_DEVICE void put(int64_t tile, const RowMoments& m, const Held& h) const {
    if (!live) return;
    const HeldColumns<VEC> where = columns(tile);
    MMFAST_UNROLL
    for (int i = 0; i < ITEMS; ++i) {
      if (!where.inside(i)) continue;
      const int64_t c = where.at(i);
      float u[VEC], v[VEC];
      MMFAST_UNROLL
      for (int j = 0; j < VEC; ++j) u[j] = m.normal(h.x[i][j]);
      if (a.weight.data != nullptr) {
        load_side<T, VEC>(a.weight.data, a.weight.dtype, c, v);
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) u[j] *= v[j];
      }
      if (a.bias.data != nullptr) {
        load_side<T, VEC>(a.bias.data, a.bias.dtype, c, v);
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) u[j] += v[j];
      }
      if (a.scale.data != nullptr) {
        side(a.scale, c, v);
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) u[j] *= 1.0f + v[j];
      }
      if (a.shift.data != nullptr) {
        side(a.shift, c, v);
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) u[j] += v[j];
      }
      store_vector<T, VEC>(static_cast<T*>(a.out.data) + row_offset(a.out, at) + c, u);
    }
  }

  MMFAST_DEVICE void row(int64_t number) {
    live = number < row_count(a.shape);
    if (live) at = row_place(number, a.shape);
    Held h;
    const RowMoments m = moments(h);
    for (int64_t tile = 0; tile < a.teams.tiles; ++tile) {
      if (a.norm == RowNorm::NONE || a.teams.tiles > 1) take(tile, a.norm == RowNorm::NONE, h);
      put(tile, m, h);
    }
  }
};

template <class T, int VEC>
MMFAST_KERNEL(kTeamLanes, VEC == 1 ? 1 : 2)
modulate_fwd_kernel(MMFAST_PARAM(ModulateFwdPlan) a) {
  SharedMemory shared;
  ModulateForward<T, VEC> op{a, {a.teams.lanes, shared.take<float>(kTeamScratch<2>)}, {}, false};
  const int32_t teams = a.teams.count;
  const int64_t first = int64_t(blockIdx.x) * a.steps * teams;
  for (int32_t step = 0; step < a.steps; ++step) {
    const int64_t begin = first + int64_t(step) * teams;
    if (begin >= row_count(a.shape)) return;  // the whole block
    op.row(begin + op.team.number());
  }
}

}  // namespace mmfast
