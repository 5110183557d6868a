// fuse on GPUs, forward: each feature is read once, absent ones not at all, and the result is
// written once. The backward is fuse_bwd.cuh.
//
// Instances, of forward and backward together: storage (3) x {16 bytes, one element} of
//   fuse_fwd_rows, fuse_fwd_channels     logits without and with channels
//   fuse_bwd_rows, fuse_bwd_channels     likewise; the latter with SUM and without
// The number of modalities, the mode and what is wanted are loops and switches that all threads
// take alike: modalities are taken kFuseBatch at a time.
#pragma once
#include "fuse_weights.cuh"
#include "launch.cuh"

namespace mmfast {

constexpr int kFuseBatch = 4;
static_assert(kFuseModalities % kFuseBatch == 0, "a batch may reach past K, not past the array");

MMFAST_DEVICE bool fuse_has_tanh(FuseKind mode) {
  return mode == FuseKind::GMU || mode == FuseKind::PAIR;
}

template <class T>
MMFAST_DEVICE T* fuse_pointer(const FuseRows& x, const TilePlace& at) {
  return static_cast<T*>(x.data) + (at.i0 * x.s0 + at.n * x.s1 + at.c);
}

// V elements of modality k; zeros, and nothing read, where it is absent.
template <class T, int V, bool ONCE>
MMFAST_DEVICE Piece<T, V> load_feature(const FuseLaunch& a, const TilePlace& at, int k,
                                       int64_t left, bool there) {
  const T* from = there ? fuse_pointer<const T>(a.x[k], at) : nullptr;
  return load_piece<T, V, ONCE>(from, there ? left : 0);
}

template <class T, bool WIDE>
MMFAST_KERNEL(kRowThreads, 6)
fuse_fwd_rows_kernel(MMFAST_PARAM(FuseLaunch) a) {
  constexpr int V = kVector<T, WIDE>;
  const TilePlace first = first_of_tile<V>(a.tiles);
  const int64_t below = a.shape.n1 - first.n;
  const int rows = int(below < a.tiles.rows ? below : a.tiles.rows);
  SharedMemory shared;
  FuseTables tables;
  tables.logits = shared.take<float>(a.tiles.rows * a.K);
  tables.weights = shared.take<float>(a.tiles.rows * a.K);
  tables.slopes = nullptr;
  fill_tables(a, tables, rows, first.i0, first.n, a.shape.n1);
  for (int i = int(threadIdx.x); i < rows << a.tiles.columns_log2; i += kRowThreads) {
    const TilePlace at = place_in_tile<V>(a.tiles, first, i);
    const int64_t left = a.shape.columns - at.c;
    if (left <= 0) continue;
    const float* weights = tables.weights + (i >> a.tiles.columns_log2) * a.K;
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = 0.0f;
    for (int k = 0; k < a.K; k += kFuseBatch) {
      Piece<T, V> x[kFuseBatch];
      float weight[kFuseBatch];
#pragma unroll
      for (int j = 0; j < kFuseBatch; ++j) {
        weight[j] = k + j < a.K ? load_shared(weights + k + j) : kAbsent;
        x[j] = load_feature<T, V, true>(a, at, k + j, left, weight[j] != kAbsent);
      }
#pragma unroll
      for (int j = 0; j < kFuseBatch; ++j) {
        if (weight[j] == kAbsent) continue;
        if (fuse_has_tanh(a.mode)) {
#pragma unroll
          for (int v = 0; v < V; ++v) out[v] += weight[j] * device_tanhf(x[j].get(v));
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) out[v] += weight[j] * x[j].get(v);
        }
      }
    }
    store_vector<T, V>(fuse_pointer<T>(a.out, at), left, out);
  }
}

template <class T, bool WIDE>
MMFAST_KERNEL(kRowThreads, 6)
fuse_fwd_channels_kernel(MMFAST_PARAM(FuseLaunch) a) {
  constexpr int V = kVector<T, WIDE>;
  const TilePlace first = first_of_tile<V>(a.tiles);
  for (int i = int(threadIdx.x); i < kRowAccesses * kRowThreads; i += kRowThreads) {
    const TilePlace at = place_in_tile<V>(a.tiles, first, i);
    const int64_t left = at.n < a.shape.n1 ? a.shape.columns - at.c : 0;
    if (left <= 0) continue;
    SoftmaxSum softmax[V];
    float scale[V], out[V];
    if (a.mode == FuseKind::SOFTMAX) {
      for (int k = 0; k < a.K; ++k) {
        if (!is_there(a, at.i0, at.n, k)) continue;
        float logits[V];
        load_logits<T, V>(a, at, k, left, logits);
#pragma unroll
        for (int v = 0; v < V; ++v) softmax[v].add(logits[v]);
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) scale[v] = softmax[v].scale(), out[v] = 0.0f;
    for (int k = 0; k < a.K; ++k) {
      if (!is_there(a, at.i0, at.n, k)) continue;
      const Piece<T, V> x = load_feature<T, V, true>(a, at, k, left, true);
      float weight[V];
      load_logits<T, V>(a, at, k, left, weight);
#pragma unroll
      for (int v = 0; v < V; ++v)
        weight[v] = a.mode == FuseKind::SOFTMAX ? softmax[v].weight(weight[v], scale[v])
                                                : gate_sigmoid(weight[v]);
      if (fuse_has_tanh(a.mode)) {
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] += weight[v] * device_tanhf(x.get(v));
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] += weight[v] * x.get(v);
      }
    }
    store_vector<T, V>(fuse_pointer<T>(a.out, at), left, out);
  }
}

template <class T, bool WIDE>
void fuse_fwd(const FuseLaunch& a, const Stream& stream) {
  const Grid grid = {a.tiles.blocks(a.shape), 1, 1};
  if (a.per_channel) {
    launch<fuse_fwd_channels_kernel<T, WIDE>>(grid, kRowThreads, 0, stream, a);
  } else {
    const int64_t shared = 2 * shared_bytes<float>(a.tiles.rows * a.K);
    launch<fuse_fwd_rows_kernel<T, WIDE>>(grid, kRowThreads, shared, stream, a);
  }
}

}  // namespace mmfast
