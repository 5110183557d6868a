// glu and glu_packed on GPUs: one pass over memory each way.
//
// Instances: storage (3) x {16 bytes, one element} of each of the two kernels; the activation is a
// switch that all threads take alike.
#pragma once
#include "gate_activations.cuh"
#include "glu.h"
#include "launch.cuh"
#include "rows.cuh"

namespace mmfast {

template <class T, bool WIDE>
MMFAST_KERNEL(kRowThreads, 8)
glu_fwd_kernel(MMFAST_PARAM(GluLaunch) x) {
  constexpr int V = kVector<T, WIDE>;
  const TilePlace first = first_of_tile<V>(x.tiles);
  TilePlace at[kRowAccesses];
  Piece<T, V> a[kRowAccesses], b[kRowAccesses];
  int64_t left[kRowAccesses];
#pragma unroll
  for (int i = 0; i < kRowAccesses; ++i) {
    at[i] = place_in_tile<V>(x.tiles, first, i * kRowThreads + int(threadIdx.x));
    left[i] = at[i].n < x.shape.n1 ? x.shape.columns - at[i].c : 0;
    const auto *p = row_pointer<const T>(x.a, first.i0, at[i].n, at[i].c),
               *q = row_pointer<const T>(x.b, first.i0, at[i].n, at[i].c);
    a[i] = load_piece<T, V, true>(p, left[i]);
    b[i] = load_piece<T, V, true>(q, left[i]);
  }
#pragma unroll
  for (int i = 0; i < kRowAccesses; ++i) {
    if (left[i] <= 0) continue;
    float out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = a[i].get(j);
    activate_glu<V>(out, x.activation);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] *= b[i].get(j);
    store_vector<T, V>(row_pointer<T>(x.out, first.i0, at[i].n, at[i].c), left[i], out);
  }
}

template <class T, bool WIDE>
MMFAST_KERNEL(kRowThreads, 6)
glu_bwd_kernel(MMFAST_PARAM(GluLaunch) x) {
  constexpr int V = kVector<T, WIDE>;
  const TilePlace first = first_of_tile<V>(x.tiles);
  TilePlace at[kRowAccesses];
  Piece<T, V> dout[kRowAccesses], a[kRowAccesses], b[kRowAccesses];
  int64_t left[kRowAccesses];
#pragma unroll
  for (int i = 0; i < kRowAccesses; ++i) {
    at[i] = place_in_tile<V>(x.tiles, first, i * kRowThreads + int(threadIdx.x));
    left[i] = at[i].n < x.shape.n1 ? x.shape.columns - at[i].c : 0;
    const auto *incoming = row_pointer<const T>(x.dout, first.i0, at[i].n, at[i].c),
               *p = row_pointer<const T>(x.a, first.i0, at[i].n, at[i].c),
               *q = row_pointer<const T>(x.b, first.i0, at[i].n, at[i].c);
    dout[i] = load_piece<T, V, true>(incoming, left[i]);
    a[i] = load_piece<T, V, true>(p, left[i]);
    b[i] = load_piece<T, V, true>(q, left[i]);
  }
#pragma unroll
  for (int i = 0; i < kRowAccesses; ++i) {
    if (left[i] <= 0) continue;
    float da[V], db[V];
#pragma unroll
    for (int j = 0; j < V; ++j) db[j] = a[i].get(j);
    activate_glu<V>(db, da, x.activation);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float d = dout[i].get(j);
      da[j] *= d * b[i].get(j);
      db[j] *= d;
    }
    store_vector<T, V>(row_pointer<T>(x.da, first.i0, at[i].n, at[i].c), left[i], da);
    store_vector<T, V>(row_pointer<T>(x.db, first.i0, at[i].n, at[i].c), left[i], db);
  }
}

// ---- launching ----------------------------------------------------------------------------------

template <class T, bool WIDE>
struct GluForms {
  static void fwd(const GluLaunch& x, const Stream& stream) {
    launch<glu_fwd_kernel<T, WIDE>>({x.tiles.blocks(x.shape), 1, 1}, kRowThreads, 0, stream, x);
  }
  static void bwd(const GluLaunch& x, const Stream& stream) {
    launch<glu_bwd_kernel<T, WIDE>>({x.tiles.blocks(x.shape), 1, 1}, kRowThreads, 0, stream, x);
  }
};

template <class T>
constexpr GluCuda glu_cuda() {
  return {[](GluLaunch& x, const Stream& stream) {
            const bool wide = wide_access(x.shape, {&x.a, &x.b, &x.out});
            x.tiles = element_tiles(x.shape, x.dtype, wide);
            wide ? GluForms<T, true>::fwd(x, stream) : GluForms<T, false>::fwd(x, stream);
          },
          [](GluLaunch& x, const Stream& stream) {
            const bool wide = wide_access(x.shape, {&x.dout, &x.a, &x.b, &x.da, &x.db});
            x.tiles = element_tiles(x.shape, x.dtype, wide);
            wide ? GluForms<T, true>::bwd(x, stream) : GluForms<T, false>::bwd(x, stream);
          }};
}

}  // namespace mmfast
