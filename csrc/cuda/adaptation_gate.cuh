// adaptation_gate, what forward and backward share: a row of z and h, how far h moves z, and the
// moments of y = z + alpha * h.
//
//     alpha = min(beta * |z| / |h|, 1) per row, 1 where |h| = 0 or the row is masked
#pragma once
#include "adaptation_gate_plan.h"
#include "row_norm.cuh"

namespace mmfast {

// alpha, and the reciprocals of the norms, 0 where alpha does not depend on that norm. They are not
// squared here: the square of a small norm's would overflow.
struct Displacement {
  float alpha = 1, by_z = 0, by_h = 0;
};

MMFAST_DEVICE Displacement displacement(float z_squares, float h_squares, float beta) {
  Displacement d;
  const float z = sqrtf(z_squares), h = sqrtf(h_squares), ratio = beta * z / h;
  if (!(ratio < 1)) return d;  // also where |h| = 0: inf, or NaN if |z| or beta is 0 too
  d.alpha = ratio;
  d.by_h = 1.0f / h;
  d.by_z = z > 0 ? 1.0f / z : 0.0f;
  return d;
}

template <class Plan, class T, int VEC, int HELD>
struct AdaptationRow {
  using Held = HeldRow<HELD, VEC>;
  static constexpr int ITEMS = Held::ITEMS;

  const Plan& a;
  RowTeam<4> team;
  RowPlace at;
  bool live = false, moved = false;  // the row is there; h takes part in it
  Held z, h;                         // of one tile

  MMFAST_DEVICE HeldColumns<VEC> columns(int64_t tile) const {
    return {tile * a.teams.tile, team.lane(), team.lanes(), a.shape.columns};
  }
  MMFAST_DEVICE void load(const RowOperand& x, int64_t c, float (&v)[VEC]) const {
    load_vector<T, VEC>(static_cast<const T*>(x.data) + row_offset(x, at) + c, v);
  }
  MMFAST_DEVICE void put(const RowOperand& x, int64_t c, const float (&v)[VEC]) const {
    store_vector<T, VEC>(static_cast<T*>(x.data) + row_offset(x, at) + c, v);
  }
  MMFAST_DEVICE void take(const RowOperand& x, bool there, int64_t tile, Held& to) const {
    const HeldColumns<VEC> where = columns(tile);
    MMFAST_UNROLL
    for (int i = 0; i < ITEMS; ++i) {
      if (there && where.inside(i)) {
        load(x, where.at(i), to.x[i]);
      } else {
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) to.x[i][j] = 0;
      }
    }
  }
  // z and h of a tile: zeros past the row, and where h takes no part.
  MMFAST_DEVICE void take(int64_t tile) {
    take(a.z, live, tile, z);
    take(a.h, moved, tile, h);
  }
  MMFAST_DEVICE void start(int64_t number, bool there) {
    live = there;
    moved = false;
    if (!live) return;
    at = row_place(number, a.shape);
    moved = row_is_on(a.row_mask, at.i0, at.i1);
  }

  // f(i, j) for the elements of a tile that are there.
  template <class F>
  MMFAST_DEVICE void each(int64_t tile, const F& f) const {
    const HeldColumns<VEC> where = columns(tile);
    MMFAST_UNROLL
    for (int i = 0; i < ITEMS; ++i)
      if (live && where.inside(i)) {
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) f(i, j);
      }
  }

  // Takes in the row: what follows from z and h alone. A row of one tile stays held.
  MMFAST_DEVICE RowMoments measure(Displacement& d) {
    const int64_t tiles = a.teams.tiles;
    float sums[4] = {0, 0, 0, 0};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      take(tile);
      each(tile, [&](int i, int j) {
        sums[0] += z.x[i][j] * z.x[i][j];
        sums[1] += h.x[i][j] * h.x[i][j];
        sums[2] += z.x[i][j];
        sums[3] += h.x[i][j];
      });
    }
    team.sum(sums);
    d = displacement(sums[0], sums[1], a.beta);
    const float centre = (sums[2] + d.alpha * sums[3]) / float(a.shape.columns);
    float apart[2] = {0, 0};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (tiles > 1) take(tile);
      each(tile, [&](int i, int j) {
        const float y = z.x[i][j] + d.alpha * h.x[i][j] - centre;
        apart[0] += y;
        apart[1] += y * y;
      });
    }
    team.sum(apart);
    return layer_moments(centre, apart[0], apart[1], a.shape.columns, a.eps);
  }
};

}  // namespace mmfast
