// adaptation_gate, backward: every gradient in one pass over dout, z and h; norms and statistics
// are computed again. With n the normalised row and g = dout * weight:
//
//     dy = rstd * (g - mean(g) - n * mean(g * n))
//     dz = dy + (sum(dy * h) * alpha / |z|^2) * z
//     dh = alpha * dy - (sum(dy * h) * alpha / |h|^2) * h
//     dweight = sum(dout * n);  dbias = sum(dout)
//
// The second terms are there where beta * |z| / |h| < 1: elsewhere alpha is a constant. A block
// takes a chunk of rows; `column_sums` adds the chunks. Rows that do not fit a team's registers are
// cut into tiles of columns, one a block, after `adaptation_gate_stats_kernel` has written what is
// needed of a row.
//
// Instances of each kernel: storage f32, bf16, f16, each with 16-byte accesses and single elements.
#pragma once
#include "adaptation_gate.cuh"

namespace mmfast {

template <class T, int VEC>
struct AdaptationBackward : AdaptationRow<AdaptationGateBwdPlan, T, VEC, kAdaptationHeldBwd> {
  using Base = AdaptationRow<AdaptationGateBwdPlan, T, VEC, kAdaptationHeldBwd>;
  using Base::a, Base::team, Base::z, Base::h, Base::live, Base::moved, Base::at;
  using typename Base::Held;
  static constexpr int ITEMS = Base::ITEMS;
  using Sums = ColumnSums<kAdaptationHeldBwd, VEC>;

  MMFAST_DEVICE AdaptationBackward(const AdaptationGateBwdPlan& plan, float* scratch)
      : Base{plan, {plan.teams.lanes, scratch}, {}, false, false, {}, {}} {}

  MMFAST_DEVICE float normal(const Displacement& d, const RowMoments& m, int i, int j) const {
    return m.normal(z.x[i][j] + d.alpha * h.x[i][j]);
  }
  // dout of a tile becomes g.
  MMFAST_DEVICE void weigh(int64_t tile, Held& g) const {
    if (a.weight.data == nullptr) return;
    const HeldColumns<VEC> where = this->columns(tile);
    MMFAST_UNROLL
    for (int i = 0; i < ITEMS; ++i) {
      if (!where.inside(i)) continue;
      float weight[VEC];
      load_side<T, VEC>(a.weight.data, a.weight.dtype, where.at(i), weight);
      MMFAST_UNROLL
      for (int j = 0; j < VEC; ++j) g.x[i][j] = mul_rn(g.x[i][j], weight[j]);
    }
  }

  // One row, or its tile `tile`. Every thread of the block comes here.
  MMFAST_DEVICE void row(int64_t number, bool there, int64_t tile, const Sums& sums) {
    this->start(number, there);
    AdaptationStats s = {};
    RowMoments m;
    Displacement d;
    if (a.stats != nullptr) {
      this->take(tile);
      if (live) {
        s = load_stats(number);
        d.alpha = s.alpha;
        m = {s.centre, s.rstd, s.offset};
      }
    } else {
      m = this->measure(d);
    }
    Held g;
    this->take(a.dout, live, tile, g);
    this->each(tile, [&](int i, int j) {
      if (a.at_weight >= 0) sums.add(a.at_weight, i, j, g.x[i][j] * normal(d, m, i, j));
      if (a.at_bias >= 0) sums.add(a.at_bias, i, j, g.x[i][j]);
    });
    if (a.dz.data == nullptr && a.dh.data == nullptr) return;
    weigh(tile, g);
    if (a.stats == nullptr) {
      float means[2] = {0, 0};
      this->each(tile, [&](int i, int j) {
        means[0] += g.x[i][j];
        means[1] += g.x[i][j] * normal(d, m, i, j);
      });
      team.sum(means);
      s.mean = means[0] / float(a.shape.columns), s.mean_n = means[1] / float(a.shape.columns);
    }
    float pull[1] = {0};  // becomes <dy, h>
    this->each(tile, [&](int i, int j) {
      g.x[i][j] = m.rstd * ((g.x[i][j] - s.mean) - normal(d, m, i, j) * s.mean_n);
      pull[0] += g.x[i][j] * h.x[i][j];
    });
    if (a.stats == nullptr) {
      team.sum(pull);
      pull_factors(pull[0], d, s);
    }
    put_gradients(tile, d.alpha, s, g);
  }

  static MMFAST_DEVICE void pull_factors(float pull, const Displacement& d, AdaptationStats& s) {
    s.of_z = d.by_z > 0 ? d.alpha * pull * d.by_z * d.by_z : 0.0f;
    s.of_h = d.by_h > 0 ? -(d.alpha * pull * d.by_h * d.by_h) : 0.0f;
  }

  MMFAST_DEVICE void put_gradients(int64_t tile, float alpha, const AdaptationStats& s,
                                   const Held& dy) const {
    const HeldColumns<VEC> where = this->columns(tile);
    MMFAST_UNROLL
    for (int i = 0; i < ITEMS; ++i) {
      if (!live || !where.inside(i)) continue;
      float v[VEC];
      if (a.dz.data != nullptr) {
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) v[j] = dy.x[i][j] + s.of_z * z.x[i][j];
        this->put(a.dz, where.at(i), v);
      }
      if (a.dh.data != nullptr) {
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) v[j] = moved ? alpha * dy.x[i][j] + s.of_h * h.x[i][j] : 0.0f;
        this->put(a.dh, where.at(i), v);
      }
    }
  }

  // ---- the row's numbers in memory --------------------------------------------------------------

  MMFAST_DEVICE AdaptationStats load_stats(int64_t number) const {
    const auto* from = reinterpret_cast<const Vec4*>(a.stats + number);
    const Vec4 low = load_global(from), high = load_global(from + 1);
    return {as_float(low.x[0]),  as_float(low.x[1]),  as_float(low.x[2]),  as_float(low.x[3]),
            as_float(high.x[0]), as_float(high.x[1]), as_float(high.x[2]), as_float(high.x[3])};
  }
  MMFAST_DEVICE void store_stats(int64_t number, const AdaptationStats& s) const {
    auto* to = reinterpret_cast<Vec4*>(a.stats + number);
    store_global(to, Vec4{as_bits(s.alpha), as_bits(s.of_z), as_bits(s.of_h), as_bits(s.centre)});
    store_global(to + 1,
                 Vec4{as_bits(s.rstd), as_bits(s.offset), as_bits(s.mean), as_bits(s.mean_n)});
  }

  // Of a whole row, tile by tile.
  MMFAST_DEVICE void stats(int64_t number) {
    this->start(number, true);
    AdaptationStats s = {};
    Displacement d;
    const RowMoments m = this->measure(d);
    Held g;
    const auto each_tile = [&](const auto& f) {
      for (int64_t tile = 0; tile < a.teams.tiles; ++tile) {
        this->take(tile);
        this->take(a.dout, true, tile, g);
        weigh(tile, g);
        this->each(tile, f);
      }
    };
    float means[2] = {0, 0}, pull[1] = {0};
    each_tile([&](int i, int j) {
      means[0] += g.x[i][j];
      means[1] += g.x[i][j] * normal(d, m, i, j);
    });
    team.sum(means);
    s.mean = means[0] / float(a.shape.columns), s.mean_n = means[1] / float(a.shape.columns);
    each_tile([&](int i, int j) {
      pull[0] += m.rstd * ((g.x[i][j] - s.mean) - normal(d, m, i, j) * s.mean_n) * h.x[i][j];
    });
    team.sum(pull);
    pull_factors(pull[0], d, s);
    s.alpha = d.alpha;
    s.centre = m.centre, s.rstd = m.rstd, s.offset = m.offset;
    if (threadIdx.x == 0) store_stats(number, s);
  }
};

template <class T, int VEC>
MMFAST_KERNEL(kTeamLanes, 1)
adaptation_gate_bwd_kernel(MMFAST_PARAM(AdaptationGateBwdPlan) a) {
  SharedMemory shared;
  AdaptationBackward<T, VEC> op(a, shared.take<float>(kTeamScratch<4>));
  float* memory = shared.take<float>(a.sums * int64_t(kAdaptationHeldBwd) * a.teams.threads);
  const ColumnSums<kAdaptationHeldBwd, VEC> sums(a.teams, memory);
  for (int i = 0; i < a.sums; ++i) sums.clear(i);
  const int64_t block = int64_t(blockIdx.x), chunk = block / a.teams.tiles;
  const int64_t tile = block - chunk * a.teams.tiles;
  const int64_t first = chunk * a.chunk_rows, left = row_count(a.shape) - first;
  const int64_t count = left < a.chunk_rows ? left : a.chunk_rows;
  for (int64_t row = 0; row < count; row += a.teams.count)
    op.row(first + row + op.team.number(), row + op.team.number() < count, tile, sums);
  if (a.sums == 0) return;  // the whole grid
  sync_threads();
  for (int32_t q = int32_t(threadIdx.x); q < int32_t(a.teams.tile); q += a.teams.threads) {
    const int64_t c = tile * a.teams.tile + q;
    if (c >= a.shape.columns) break;
    const auto put = [&](const RowOperand& to, int32_t sum) {
      if (sum < 0) return;
      const float v[1] = {sums.total(sum, q)};
      store_side<T, 1>(to.data, to.dtype, chunk * to.s0 + c, v);
    };
    put(a.sum_weight, a.at_weight);
    put(a.sum_bias, a.at_bias);
  }
}

template <class T, int VEC>
MMFAST_KERNEL(kTeamLanes, 1)
adaptation_gate_stats_kernel(MMFAST_PARAM(AdaptationGateBwdPlan) a) {
  SharedMemory shared;
  AdaptationBackward<T, VEC> op(a, shared.take<float>(kTeamScratch<4>));
  op.stats(int64_t(blockIdx.x));
}

}  // namespace mmfast
