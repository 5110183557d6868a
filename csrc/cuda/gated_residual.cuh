// gated_residual on GPUs. The forward reads x and y once and writes once; the backward reads dout
// and y once and writes dy once, and the gradient of the gate is summed on the way: over the
// columns of a row by the lanes that share it, over rows in two stages (partial sums of chunks of
// rows, which shapes alone determine, then column_sums).
//
// Instances: storage (3) x {16 bytes, one element} of each of the four kernels. The activation, the
// gate's dtype and its form are switches that all threads take alike.
#pragma once
#include "gate_activations.cuh"
#include "gated_residual.h"
#include "launch.cuh"
#include "rows.cuh"

namespace mmfast {

// act(gate) beside V elements, and its slope.
template <class T, int V>
struct GateValues {
  float value[V], slope[V];

  MMFAST_DEVICE void load(const GatedResidualLaunch& a, int64_t i0, int64_t n, int64_t c,
                          int64_t left, bool with_slope) {
    const int64_t at = row_offset(a.gate, i0, n);
    if (a.gate.sc != 0) {
      load_side<T, V>(a.gate.data, a.gate.dtype, at + c, left, value);
      activate(value, slope, a.activation, with_slope);
    } else {
      float one[1], one_slope[1];
      load_side<T, 1>(a.gate.data, a.gate.dtype, at, one);
      activate(one, one_slope, a.activation, with_slope);
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = one[0], slope[i] = one_slope[0];
    }
  }

 private:
  template <int N>
  static MMFAST_DEVICE void activate(float (&x)[N], float (&slopes)[N], int activation,
                                     bool with_slope) {
    if (with_slope) {
      activate_gate<N>(x, slopes, activation);
    } else {
      activate_gate<N>(x, activation);
#pragma unroll
      for (int i = 0; i < N; ++i) slopes[i] = 0.0f;
    }
  }
};

template <class T, bool WIDE>
MMFAST_KERNEL(kRowThreads, 8)
gated_residual_fwd_kernel(MMFAST_PARAM(GatedResidualLaunch) a) {
  constexpr int V = kVector<T, WIDE>;
  const TilePlace first = first_of_tile<V>(a.tiles);
  TilePlace at[kRowAccesses];
  Piece<T, V> x[kRowAccesses], y[kRowAccesses];
  int64_t left[kRowAccesses];
  bool on[kRowAccesses];
#pragma unroll
  for (int i = 0; i < kRowAccesses; ++i) {
    at[i] = place_in_tile<V>(a.tiles, first, i * kRowThreads + int(threadIdx.x));
    left[i] = at[i].n < a.shape.n1 ? a.shape.columns - at[i].c : 0;
    on[i] = left[i] > 0 && row_is_on(a.mask, first.i0, at[i].n);
    const auto* from = row_pointer<const T>(a.x, first.i0, at[i].n, at[i].c);
    x[i] = load_piece<T, V, true>(from, left[i]);
    const auto* branch = row_pointer<const T>(a.y, first.i0, at[i].n, at[i].c);
    y[i] = load_piece<T, V, true>(branch, on[i] ? left[i] : 0);
  }
#pragma unroll
  for (int i = 0; i < kRowAccesses; ++i) {
    if (left[i] <= 0) continue;
    float out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = x[i].get(j);
    if (on[i]) {
      GateValues<T, V> gate;
      gate.load(a, first.i0, at[i].n, at[i].c, left[i], false);
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] += gate.value[j] * y[i].get(j);
    }
    store_vector<T, V>(row_pointer<T>(a.out, first.i0, at[i].n, at[i].c), left[i], out);
  }
}

// dy, and the gradient of a gate like the data.
template <class T, bool WIDE>
MMFAST_KERNEL(kRowThreads, 8)
gated_residual_bwd_kernel(MMFAST_PARAM(GatedResidualLaunch) a) {
  constexpr int V = kVector<T, WIDE>;
  const TilePlace first = first_of_tile<V>(a.tiles);
  TilePlace at[kRowAccesses];
  Piece<T, V> dout[kRowAccesses], y[kRowAccesses];
  int64_t left[kRowAccesses];
  bool on[kRowAccesses];
  const bool has_dgate = a.dgate.data != nullptr;
#pragma unroll
  for (int i = 0; i < kRowAccesses; ++i) {
    at[i] = place_in_tile<V>(a.tiles, first, i * kRowThreads + int(threadIdx.x));
    left[i] = at[i].n < a.shape.n1 ? a.shape.columns - at[i].c : 0;
    on[i] = left[i] > 0 && row_is_on(a.mask, first.i0, at[i].n);
    const int64_t there = on[i] ? left[i] : 0;
    const auto* incoming = row_pointer<const T>(a.dout, first.i0, at[i].n, at[i].c);
    dout[i] = load_piece<T, V, true>(incoming, there);
    const auto* branch = row_pointer<const T>(a.y, first.i0, at[i].n, at[i].c);
    y[i] = load_piece<T, V, true>(branch, has_dgate ? there : 0);
  }
#pragma unroll
  for (int i = 0; i < kRowAccesses; ++i) {
    if (left[i] <= 0) continue;
    float dy[V], dgate[V];
#pragma unroll
    for (int j = 0; j < V; ++j) dy[j] = dgate[j] = 0.0f;
    if (on[i]) {
      GateValues<T, V> gate;
      gate.load(a, first.i0, at[i].n, at[i].c, left[i], has_dgate);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float d = dout[i].get(j);
        dy[j] = d * gate.value[j];
        dgate[j] = d * y[i].get(j) * gate.slope[j];
      }
    }
    if (a.dy.data != nullptr)
      store_vector<T, V>(row_pointer<T>(a.dy, first.i0, at[i].n, at[i].c), left[i], dy);
    if (has_dgate) {
      const int64_t to = row_offset(a.dgate, first.i0, at[i].n) + at[i].c;
      store_side<T, V>(a.dgate.data, a.dgate.dtype, to, left[i], dgate);
    }
  }
}

// Adds dout * y of V elements to `sums` and writes dy = dout * value; a row that is off adds
// nothing and gets zeros.
template <class T, int V>
MMFAST_DEVICE void gated_residual_products(const GatedResidualLaunch& a, int64_t i0, int64_t n,
                                           int64_t c, int64_t left, bool on,
                                           const Piece<T, V>& dout, const Piece<T, V>& y,
                                           const float (&value)[V], float (&sums)[V]) {
  if (left <= 0) return;
  float dy[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float d = dout.get(j);
    dy[j] = on ? d * value[j] : 0.0f;
    sums[j] += on ? d * y.get(j) : 0.0f;
  }
  if (a.dy.data != nullptr) store_vector<T, V>(row_pointer<T>(a.dy, i0, n, c), left, dy);
}

// One gate a row: 2^columns_log2 lanes take the row.
template <class T, bool WIDE>
MMFAST_KERNEL(kRowThreads, 8)
gated_residual_bwd_rows_kernel(MMFAST_PARAM(GatedResidualLaunch) a) {
  constexpr int V = kVector<T, WIDE>;
  SharedMemory shared;
  float* buffer = shared.take<float>(kTeamSumFloats<1>);
  const int lanes_log2 = a.tiles.columns_log2, lanes = 1 << lanes_log2;
  const TilePlace first = first_of_tile<V>(a.tiles);
  const int64_t i0 = first.i0, n = first.n + (int(threadIdx.x) >> lanes_log2);
  const int lane = int(threadIdx.x) & (lanes - 1);
  const bool there = n < a.shape.n1, on = there && row_is_on(a.mask, i0, n);
  float value[V], slope = 0.0f, sums[V];
#pragma unroll
  for (int j = 0; j < V; ++j) value[j] = sums[j] = 0.0f;
  if (there) {
    GateValues<T, 1> gate;
    gate.load(a, i0, n, 0, 1, true);
    slope = gate.slope[0];
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] = gate.value[0];
  }
  const int64_t step = int64_t(lanes) * V;
  for (int64_t begin = lane * V; there && begin < a.shape.columns; begin += kRowAccesses * step) {
    Piece<T, V> dout[kRowAccesses], y[kRowAccesses];
#pragma unroll
    for (int i = 0; i < kRowAccesses; ++i) {
      const int64_t c = begin + i * step, left = on ? a.shape.columns - c : 0;
      dout[i] = load_piece<T, V, true>(row_pointer<const T>(a.dout, i0, n, c), left);
      y[i] = load_piece<T, V, true>(row_pointer<const T>(a.y, i0, n, c), left);
    }
#pragma unroll
    for (int i = 0; i < kRowAccesses; ++i) {
      const int64_t c = begin + i * step;
      gated_residual_products<T, V>(a, i0, n, c, a.shape.columns - c, on, dout[i], y[i], value,
                                    sums);
    }
  }
  float total[1] = {0.0f};
#pragma unroll
  for (int j = 0; j < V; ++j) total[0] += sums[j];
  team_sums<1>(total, lanes_log2, buffer);
  if (!there || lane != 0) return;
  const float dgate[1] = {on ? total[0] * slope : 0.0f};
  store_side<T, 1>(a.dgate.data, a.dgate.dtype, row_offset(a.dgate, i0, n), dgate);
}

// Rows that share a gate: the sums of a chunk of rows, column by column or all together.
template <class T, bool WIDE>
MMFAST_KERNEL(kRowThreads, 4)
gated_residual_bwd_sums_kernel(MMFAST_PARAM(GatedResidualLaunch) a) {
  constexpr int V = kVector<T, WIDE>, ROWS = 2 * kRowAccesses;
  SharedMemory shared;
  float* buffer = shared.take<float>(V * kRowThreads);
  const int log2 = a.tiles.columns_log2, thread_rows = kRowThreads >> log2;
  const TilePlace first = first_of_tile<V>(a.tiles);
  const TilePlace mine = place_in_tile<V>(a.tiles, first, int(threadIdx.x));
  const int64_t i0 = first.i0, c = mine.c, left = a.shape.columns - c;
  const int64_t last = first.n + a.tiles.rows < a.shape.n1 ? first.n + a.tiles.rows : a.shape.n1;
  float sums[V];
#pragma unroll
  for (int j = 0; j < V; ++j) sums[j] = 0.0f;
  GateValues<T, V> gate;
  gate.load(a, i0, 0, c, left, true);
  for (int64_t begin = mine.n; left > 0 && begin < last; begin += ROWS * thread_rows) {
    Piece<T, V> dout[ROWS], y[ROWS];
    bool on[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int64_t n = begin + i * thread_rows;
      on[i] = n < last && row_is_on(a.mask, i0, n);
      const int64_t there = on[i] ? left : 0;
      dout[i] = load_piece<T, V, true>(row_pointer<const T>(a.dout, i0, n, c), there);
      y[i] = load_piece<T, V, true>(row_pointer<const T>(a.y, i0, n, c), there);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int64_t n = begin + i * thread_rows;
      gated_residual_products<T, V>(a, i0, n, c, n < last ? left : 0, on[i], dout[i], y[i],
                                    gate.value, sums);
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) sums[j] = j < left ? sums[j] * gate.slope[j] : 0.0f;
  if (a.gate.sc != 0) {
    sum_over_rows<V>(sums, log2, buffer);
    if (int(threadIdx.x) >> log2 != 0 || left <= 0) return;
    const int64_t part = int64_t(blockIdx.x) / a.tiles.tiles_c;
    store_partials<V>(a.parts, part, a.shape.columns, c, sums);
  } else {
    float total[1] = {0.0f};
#pragma unroll
    for (int j = 0; j < V; ++j) total[0] += sums[j];
    team_sums<1>(total, kRowThreadsLog2, buffer);
    if (threadIdx.x == 0) store_global(a.parts + int64_t(blockIdx.x), total[0]);
  }
}

// ---- launching ----------------------------------------------------------------------------------

template <class T, bool WIDE>
struct GatedResidualForms {
  static constexpr int V = kVector<T, WIDE>;

  static void fwd(const GatedResidualLaunch& a, const Stream& stream) {
    launch<gated_residual_fwd_kernel<T, WIDE>>({a.tiles.blocks(a.shape), 1, 1}, kRowThreads, 0,
                                               stream, a);
  }

  static void bwd(const GatedResidualLaunch& a, const Stream& stream) {
    const Grid grid = {a.tiles.blocks(a.shape), 1, 1};
    if (a.gradient == GateGradient::ELEMENTS) {
      launch<gated_residual_bwd_kernel<T, WIDE>>(grid, kRowThreads, 0, stream, a);
    } else if (a.gradient == GateGradient::ROWS) {
      constexpr int64_t kShared = shared_bytes<float>(kTeamSumFloats<1>);
      launch<gated_residual_bwd_rows_kernel<T, WIDE>>(grid, kRowThreads, kShared, stream, a);
    } else {
      constexpr int64_t kShared = shared_bytes<float>(V * kRowThreads);
      launch<gated_residual_bwd_sums_kernel<T, WIDE>>(grid, kRowThreads, kShared, stream, a);
    }
  }
};

template <class T>
constexpr GatedResidualCuda gated_residual_cuda() {
  return {[](const GatedResidualLaunch& a, const Stream& stream) {
            a.tiles.wide ? GatedResidualForms<T, true>::fwd(a, stream)
                         : GatedResidualForms<T, false>::fwd(a, stream);
          },
          [](const GatedResidualLaunch& a, const Stream& stream) {
            a.tiles.wide ? GatedResidualForms<T, true>::bwd(a, stream)
                         : GatedResidualForms<T, false>::bwd(a, stream);
          }};
}

}  // namespace mmfast
