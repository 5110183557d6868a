// adaptation_gate, forward: out = layer_norm(z + alpha * h) * weight + bias. A team reads a row of
// z and of h once into registers; longer rows are read three times, twice from the caches.
//
// Instances: storage f32, bf16, f16, each with 16-byte accesses and with single elements.
#pragma once
#include "adaptation_gate.cuh"

namespace mmfast {

template <class T, int VEC>
MMFAST_KERNEL(kTeamLanes, 1)
adaptation_gate_fwd_kernel(MMFAST_PARAM(AdaptationGateFwdPlan) a) {
  SharedMemory shared;
  using Row = AdaptationRow<AdaptationGateFwdPlan, T, VEC, kAdaptationHeld>;
  Row row{a, {a.teams.lanes, shared.take<float>(kTeamScratch<4>)}, {}, false, false, {}, {}};
  const int64_t first = int64_t(blockIdx.x) * a.steps * a.teams.count;
  for (int32_t step = 0; step < a.steps; ++step) {
    const int64_t begin = first + int64_t(step) * a.teams.count;
    if (begin >= row_count(a.shape)) return;  // the whole block
    const int64_t number = begin + row.team.number();
    row.start(number, number < row_count(a.shape));
    Displacement d;
    const RowMoments m = row.measure(d);
    for (int64_t tile = 0; tile < a.teams.tiles; ++tile) {
      if (a.teams.tiles > 1) row.take(tile);
      const HeldColumns<VEC> where = row.columns(tile);
      MMFAST_UNROLL
      for (int i = 0; i < Row::ITEMS; ++i) {
        if (!row.live || !where.inside(i)) continue;
        const int64_t c = where.at(i);
        float y[VEC], v[VEC];
        MMFAST_UNROLL
        for (int j = 0; j < VEC; ++j) y[j] = m.normal(row.z.x[i][j] + d.alpha * row.h.x[i][j]);
        if (a.weight.data != nullptr) {
          load_side<T, VEC>(a.weight.data, a.weight.dtype, c, v);
          MMFAST_UNROLL
          for (int j = 0; j < VEC; ++j) y[j] *= v[j];
        }
        if (a.bias.data != nullptr) {
          load_side<T, VEC>(a.bias.data, a.bias.dtype, c, v);
          MMFAST_UNROLL
          for (int j = 0; j < VEC; ++j) y[j] += v[j];
        }
        row.put(a.out, c, y);
      }
    }
  }
}

}  // namespace mmfast
