// modulate, backward: every gradient in one pass over the incoming gradients, h and x; statistics
// are computed again. With n = norm(h), d = dout * (1 + scale) * weight:
//
//     dh        = dh + rstd * (d - mean(d) - n * mean(d * n))      (rms: without mean(d))
//     dresidual = dh;  dx = gate * dh;  dgate = sum(dh * x)
//     dscale    = sum(dout * (n * weight + bias));  dshift = sum(dout)
//     dweight   = sum(dout * (1 + scale) * n);      dbias  = sum(dout * (1 + scale))
//
// A block takes a chunk of rows and keeps its column sums in registers; `column_sums` adds the
// chunks. Rows that do not fit a team's registers are cut into tiles of columns, one a block, after
// `modulate_stats_kernel` has written what is needed of a row; without a norm nothing is.
//
// Instances of each kernel: storage f32, bf16, f16, each with 16-byte accesses and single elements.
#pragma once
#include "modulate_plan.h"
#include "row_norm.cuh"

namespace mmfast {

template <class T, int VEC>
struct ModulateBackward {
  using Held = HeldRow<kModulateHeldBwd, VEC>;
  static constexpr int ITEMS = Held::ITEMS;

  const ModulateBwdPlan& a;
  RowTeam<2> team;
  RowPlace at;
  bool live = false;

  MMFAST_DEVICE HeldColumns<VEC> columns(int64_t tile) const {
    return {tile * a.teams.tile, team.lane(), team.lanes(), a.shape.columns};
  }
  MMFAST_DEVICE void side(const RowOperand& x, int64_t c, float (&v)[VEC]) const {
    load_side<T, VEC>(x.data, x.dtype, row_offset(x, at) + c, v);
  }
  MMFAST_DEVICE void load(const RowOperand& x, int64_t c, float (&v)[VEC]) const {
    load_vector<T, VEC>(static_cast<const T*>(x.data) + row_offset(x, at) + c, v);
  }
  MMFAST_DEVICE void put_side(const RowOperand& x, int64_t c, const float (&v)[VEC]) const {
    store_side<T, VEC>(x.data, x.dtype, row_offset(x, at) + c, v);
  }
  MMFAST_DEVICE void put_data(const RowOperand& x, int64_t c, const float (&v)[VEC]) const {
    store_vector<T, VEC>(static_cast<T*>(x.data) + row_offset(x, at) + c, v);
  }

  // A tile of a row, zeros past its end.
  MMFAST_DEVICE void take(const RowOperand& x, int64_t tile, Held& to) const {
    const HeldColumns<VEC> where = columns(tile);
    MMFAST_UNROLL
    for (int i = 0; i < ITEMS; ++i) {
      if (live && where.inside(i)) {
        load(x, where.at(i), to.x[i]);
      } else {
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) to.x[i][j] = 0;
      }
    }
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

  MMFAST_DEVICE void multiply(const RowOperand& factor, float one, int64_t c,
                              float (&v)[VEC]) const {
    float by[VEC];
    side(factor, c, by);
    MMFAST_UNROLL
    for (int j = 0; j < VEC; ++j) v[j] = mul_rn(v[j], one + by[j]);
  }
};

// ---- rows that fit --------------------------------------------------------------------------

template <class T, int VEC>
struct ModulateBackwardRows : ModulateBackward<T, VEC> {
  using Base = ModulateBackward<T, VEC>;
  using Base::a, Base::team, Base::at, Base::live;
  using typename Base::Held;
  static constexpr int ITEMS = Base::ITEMS;

  int64_t tile = 0;
  bool data;  // a gradient of the size of the data is wanted
  ColumnSums<kModulateHeldBwd, VEC> sums;

  MMFAST_DEVICE ModulateBackwardRows(const ModulateBwdPlan& plan, float* scratch, float* memory)
      : Base{plan, {plan.teams.lanes, scratch}, {}}, sums(plan.teams, memory) {
    data = a.dx.data != nullptr || a.dresidual.data != nullptr || a.dgate.data != nullptr ||
           a.at_gate >= 0;
    for (int i = 0; i < a.sums; ++i) sums.clear(i);
  }

  // h becomes the normalised row.
  MMFAST_DEVICE float normalise(int64_t number, Held& h) {
    RowMoments m;
    if (a.stats != nullptr) {
      const float* stats = a.stats + number * kModulateStats;
      if (live) m = {load_global(stats), load_global(stats + 1), load_global(stats + 2)};
    } else if (a.norm == RowNorm::LAYER) {
      float sum[1] = {0}, sums[2] = {0, 0};
      this->each(tile, [&](int i, int j) { sum[0] += h.x[i][j]; });
      team.sum(sum);
      const float centre = sum[0] / float(a.shape.columns);
      this->each(tile, [&](int i, int j) {
        const float d = h.x[i][j] - centre;
        sums[0] += d;
        sums[1] += d * d;
      });
      team.sum(sums);
      m = layer_moments(centre, sums[0], sums[1], a.shape.columns, a.eps);
    } else {
      float squares[1] = {0};
      this->each(tile, [&](int i, int j) { squares[0] += h.x[i][j] * h.x[i][j]; });
      team.sum(squares);
      m = rms_moments(squares[0], a.shape.columns, a.eps);
    }
    this->each(tile, [&](int i, int j) { h.x[i][j] = m.normal(h.x[i][j]); });
    return m.rstd;
  }

  // What is written row by row of the sides beside the norm, and the sums; d = dout becomes
  // dout * (1 + scale) * weight.
  MMFAST_DEVICE void through_sides(const Held& n, Held& d) {
    const HeldColumns<VEC> where = this->columns(tile);
    MMFAST_UNROLL
    for (int i = 0; i < ITEMS; ++i) {
      if (!live || !where.inside(i)) continue;
      const int64_t c = where.at(i);
      float (&v)[VEC] = d.x[i];
      if (a.at_dout >= 0) {
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) sums.add(a.at_dout, i, j, v[j]);
      }
      if (a.dshift.data != nullptr) this->put_side(a.dshift, c, v);
      if (a.dscale.data != nullptr) {
        float u[VEC], by[VEC];
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) u[j] = n.x[i][j];
        if (a.weight.data != nullptr) this->multiply(a.weight, 0.0f, c, u);
        if (a.bias.data != nullptr) {
          this->side(a.bias, c, by);
          MMFAST_UNROLL
          for (int j = 0; j < VEC; ++j) u[j] += by[j];
        }
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) u[j] *= v[j];
        this->put_side(a.dscale, c, u);
      }
      // Where the rows of a chunk share a scale, its factor comes out of their sums.
      if (!a.scale_by_row && a.at_d_n >= 0) {
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) sums.add(a.at_d_n, i, j, v[j] * n.x[i][j]);
      }
      if (a.scale.data != nullptr) this->multiply(a.scale, 1.0f, c, v);
      if (a.at_d >= 0) {
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) sums.add(a.at_d, i, j, v[j]);
      }
      if (a.scale_by_row && a.at_d_n >= 0) {
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) sums.add(a.at_d_n, i, j, v[j] * n.x[i][j]);
      }
      if (data && a.weight.data != nullptr) this->multiply(a.weight, 0.0f, c, v);
    }
  }

  // d, the gradient of the normalised row, becomes that of h.
  MMFAST_DEVICE void through_norm(int64_t number, const Held& n, float rstd, Held& d) {
    float means[2] = {0, 0};
    if (a.stats != nullptr) {
      const float* stats = a.stats + number * kModulateStats;
      if (live) means[0] = load_global(stats + 3), means[1] = load_global(stats + 4);
    } else {
      this->each(tile, [&](int i, int j) {
        means[0] += d.x[i][j];
        means[1] += d.x[i][j] * n.x[i][j];
      });
      team.sum(means);
      means[0] /= float(a.shape.columns), means[1] /= float(a.shape.columns);
    }
    if (a.norm == RowNorm::RMS) means[0] = 0;
    this->each(tile, [&](int i, int j) {
      d.x[i][j] = rstd * ((d.x[i][j] - means[0]) - n.x[i][j] * means[1]);
    });
  }

  // From the gradient that came through the norm to those of the two branches of h, and the gate's.
  MMFAST_DEVICE void through_branches(Held& d) {
    const HeldColumns<VEC> where = this->columns(tile);
    MMFAST_UNROLL
    for (int i = 0; i < ITEMS; ++i) {
      if (!live || !where.inside(i)) continue;
      const int64_t c = where.at(i);
      float (&v)[VEC] = d.x[i];
      float other[VEC];
      if (a.dh.data != nullptr) {
        this->load(a.dh, c, other);
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) v[j] += other[j];
      }
      if (a.dresidual.data != nullptr) this->put_data(a.dresidual, c, v);
      if (a.dgate.data != nullptr || a.at_gate >= 0) {
        this->load(a.x, c, other);
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) other[j] *= v[j];
        if (a.dgate.data != nullptr) {
          this->put_side(a.dgate, c, other);
        } else {
          MMFAST_UNROLL
          for (int j = 0; j < VEC; ++j) sums.add(a.at_gate, i, j, other[j]);
        }
      }
      if (a.dx.data != nullptr) {
        if (a.gate.data != nullptr) this->multiply(a.gate, 0.0f, c, v);
        this->put_data(a.dx, c, v);
      }
    }
  }

  MMFAST_DEVICE void row(int64_t number, bool there) {
    live = there;
    if (live) at = row_place(number, a.shape);
    Held n, d;
    MMFAST_UNROLL
    for (int i = 0; i < ITEMS; ++i) {
      MMFAST_UNROLL
      for (int j = 0; j < VEC; ++j) n.x[i][j] = d.x[i][j] = 0;
    }
    if (a.dout.data != nullptr) {
      const bool normalised = a.norm != RowNorm::NONE;
      const bool uses_n = (data && normalised) || a.at_d_n >= 0 || a.dscale.data != nullptr;
      if (uses_n) this->take(a.h, tile, n);
      this->take(a.dout, tile, d);
      const float rstd = uses_n && normalised ? normalise(number, n) : 1.0f;
      through_sides(n, d);
      if (data && normalised) through_norm(number, n, rstd, d);
    }
    if (data) through_branches(d);
  }

  // ---- the sums of a chunk --------------------------------------------------------------------

  MMFAST_DEVICE void put_sum(const RowOperand& to, int64_t chunk, int64_t c, float x) const {
    const float v[1] = {x};
    if (to.data != nullptr) store_side<T, 1>(to.data, to.dtype, chunk * to.s0 + c, v);
  }
  MMFAST_DEVICE float one(const RowOperand& x, int64_t c, float absent) const {
    float v[1] = {absent};
    if (x.data != nullptr) load_side<T, 1>(x.data, x.dtype, row_offset(x, at) + c, v);
    return v[0];
  }

  // `first`: a row of the chunk, for the scale that its rows share.
  MMFAST_DEVICE void finish(int64_t chunk, int64_t first) {
    if (a.sums == 0) return;  // the whole grid
    sync_threads();
    at = row_place(first, a.shape);
    for (int32_t q = int32_t(threadIdx.x); q < int32_t(a.teams.tile); q += a.teams.threads) {
      const int64_t c = tile * a.teams.tile + q;
      if (c >= a.shape.columns) break;
      if (a.at_gate >= 0) put_sum(a.sum_gate, chunk, c, sums.total(a.at_gate, q));
      const float dout = a.at_dout >= 0 ? sums.total(a.at_dout, q) : 0.0f;
      const float d_n = a.at_d_n >= 0 ? sums.total(a.at_d_n, q) : 0.0f;
      put_sum(a.sum_shift, chunk, c, dout);
      if (a.sum_scale.data != nullptr)
        put_sum(a.sum_scale, chunk, c, d_n * one(a.weight, c, 1.0f) + dout * one(a.bias, c, 0.0f));
      const float by = a.scale_by_row ? 1.0f : 1.0f + one(a.scale, c, 0.0f);
      put_sum(a.sum_weight, chunk, c, by * d_n);
      if (a.sum_bias.data != nullptr)
        put_sum(a.sum_bias, chunk, c, a.scale_by_row ? sums.total(a.at_d, q) : by * dout);
    }
  }
};

template <class T, int VEC>
MMFAST_KERNEL(kTeamLanes, 1)
modulate_bwd_kernel(MMFAST_PARAM(ModulateBwdPlan) a) {
  SharedMemory shared;
  float* scratch = shared.take<float>(kTeamScratch<2>);
  float* memory = shared.take<float>(a.sums * int64_t(kModulateHeldBwd) * a.teams.threads);
  ModulateBackwardRows<T, VEC> op(a, scratch, memory);
  const int64_t block = int64_t(blockIdx.x), chunk = block / a.teams.tiles;
  op.tile = block - chunk * a.teams.tiles;
  const int64_t group = chunk / a.chunks, from = (chunk - group * a.chunks) * a.chunk_rows;
  const int64_t first = group * a.group_rows + from;
  const int64_t left = a.group_rows - from, count = left < a.chunk_rows ? left : a.chunk_rows;
  for (int64_t row = 0; row < count; row += a.teams.count)
    op.row(first + row + op.team.number(), row + op.team.number() < count);
  op.finish(chunk, first);
}

// ---- what is needed of rows that do not fit -------------------------------------------------

template <class T, int VEC>
MMFAST_KERNEL(kTeamLanes, 1)
modulate_stats_kernel(MMFAST_PARAM(ModulateBwdPlan) a) {
  SharedMemory shared;
  ModulateBackward<T, VEC> op{a, {a.teams.lanes, shared.take<float>(kTeamScratch<2>)}, {}};
  const int64_t number = int64_t(blockIdx.x);
  op.at = row_place(number, a.shape);
  op.live = true;
  typename ModulateBackward<T, VEC>::Held h, d;
  const auto each = [&](const auto& f) {
    for (int64_t tile = 0; tile < a.teams.tiles; ++tile) {
      op.take(a.h, tile, h);
      f(tile);
    }
  };
  RowMoments m;
  float sum[1] = {0}, sums[2] = {0, 0}, means[2] = {0, 0};
  if (a.norm == RowNorm::LAYER) {
    each([&](int64_t tile) { op.each(tile, [&](int i, int j) { sum[0] += h.x[i][j]; }); });
    op.team.sum(sum);
    const float centre = sum[0] / float(a.shape.columns);
    each([&](int64_t tile) {
      op.each(tile, [&](int i, int j) {
        const float apart = h.x[i][j] - centre;
        sums[0] += apart;
        sums[1] += apart * apart;
      });
    });
    op.team.sum(sums);
    m = layer_moments(centre, sums[0], sums[1], a.shape.columns, a.eps);
  } else {
    each([&](int64_t tile) {
      op.each(tile, [&](int i, int j) { sum[0] += h.x[i][j] * h.x[i][j]; });
    });
    op.team.sum(sum);
    m = rms_moments(sum[0], a.shape.columns, a.eps);
  }
  each([&](int64_t tile) {
    op.take(a.dout, tile, d);
    const HeldColumns<VEC> where = op.columns(tile);
    MMFAST_UNROLL
    for (int i = 0; i < ModulateBackward<T, VEC>::ITEMS; ++i) {
      if (!where.inside(i)) continue;
      if (a.scale.data != nullptr) op.multiply(a.scale, 1.0f, where.at(i), d.x[i]);
      if (a.weight.data != nullptr) op.multiply(a.weight, 0.0f, where.at(i), d.x[i]);
    }
    op.each(tile, [&](int i, int j) {
      means[0] += d.x[i][j];
      means[1] += d.x[i][j] * m.normal(h.x[i][j]);
    });
  });
  op.team.sum(means);
  if (threadIdx.x == 0) {
    float* to = a.stats + number * kModulateStats;
    store_global(to, m.centre);
    store_global(to + 1, m.rstd);
    store_global(to + 2, m.offset);
    store_global(to + 3, means[0] / float(a.shape.columns));
    store_global(to + 4, means[1] / float(a.shape.columns));
  }
}

}  // namespace mmfast
