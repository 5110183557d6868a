// fuse on GPUs, backward: the result's gradient and the features are read, the features' gradients
// written once, and the logits' gradients summed on the way.
//
// With d_k what the gradient of weight k is (dout * x_k, of tanh(x_k) for GMU) and summed over the
// channels that share a logit: softmax dl_k = w_k (d_k - sum_j w_j d_j), sigmoid s (1 - s) d_k.
#pragma once
#include "fuse.cuh"

namespace mmfast {

// ---- logits without channels --------------------------------------------------------------------

// dl of logit k of one row, from the row's tables and the gradients of its weights.
MMFAST_DEVICE float fuse_logit_gradient(const FuseLaunch& a, const FuseTables& tables,
                                        const float* products, int row, int k) {
  const float *weights = tables.weights + row * a.K, *slopes = tables.slopes + row * a.K;
  const float* d = products + row * a.K;
  if (a.mode == FuseKind::PAIR) {  // z and 1 - z
    const float up = load_shared(slopes), down = load_shared(slopes + 1);
    return (up == kAbsent ? 0.0f : up * load_shared(d)) -
           (down == kAbsent ? 0.0f : down * load_shared(d + 1));
  }
  const float slope = load_shared(slopes + k);
  if (slope == kAbsent) return 0.0f;
  float mean = 0.0f;
  if (a.mode == FuseKind::SOFTMAX) {
    for (int j = 0; j < a.K; ++j) {
      const float weight = load_shared(weights + j);
      if (weight != kAbsent) mean += weight * load_shared(d + j);
    }
  }
  return slope * (load_shared(d + k) - mean);
}

// dx_k = dout * w_k of the columns of one row that this lane has, a batch of modalities; `sums`
// gets what they add to d_k.
template <class T, int V>
MMFAST_DEVICE void fuse_row_batch(const FuseLaunch& a, TilePlace at, int lane, int lanes,
                                  const float* weights, int k, float (&sums)[kFuseBatch]) {
  float weight[kFuseBatch];
#pragma unroll
  for (int j = 0; j < kFuseBatch; ++j)
    weight[j] = k + j < a.K ? load_shared(weights + k + j) : kAbsent;
  for (at.c = lane * V; at.c < a.shape.columns; at.c += int64_t(lanes) * V) {
    const int64_t left = a.shape.columns - at.c;
    const Piece<T, V> incoming = load_piece<T, V>(fuse_pointer<const T>(a.dout, at), left);
    Piece<T, V> x[kFuseBatch];
#pragma unroll
    for (int j = 0; j < kFuseBatch; ++j) {
      const bool read = weight[j] != kAbsent && (a.need_dlogits || fuse_has_tanh(a.mode));
      x[j] = load_feature<T, V, true>(a, at, k + j, left, read);
    }
#pragma unroll
    for (int j = 0; j < kFuseBatch; ++j) {
      if (k + j >= a.K) continue;
      float dx[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float dout = incoming.get(v);
        float value = x[j].get(v), slope = 1.0f;
        if (fuse_has_tanh(a.mode)) value = device_tanhf(value), slope = 1.0f - value * value;
        dx[v] = weight[j] == kAbsent ? 0.0f : dout * weight[j] * slope;
        sums[j] += weight[j] == kAbsent ? 0.0f : dout * value;
      }
      if (a.need_dx) store_vector<T, V>(fuse_pointer<T>(a.dx[k + j], at), left, dx);
    }
  }
}

// A block takes a chunk of rows, as many at a time as it has teams of 2^columns_log2 lanes.
template <class T, bool WIDE>
MMFAST_KERNEL(kRowThreads, 4)
fuse_bwd_rows_kernel(MMFAST_PARAM(FuseLaunch) a) {
  constexpr int V = kVector<T, WIDE>;
  const int lanes_log2 = a.tiles.columns_log2, lanes = 1 << lanes_log2;
  const int rows = kRowThreads >> lanes_log2, count = rows * a.K;
  SharedMemory shared;
  FuseTables tables;
  tables.logits = shared.take<float>(count);
  tables.weights = shared.take<float>(count);
  tables.slopes = shared.take<float>(count);
  float* products = tables.logits;  // read no more once the tables are filled
  float* totals = shared.take<float>(count);
  float* buffer = shared.take<float>(kTeamSumFloats<kFuseBatch>);
  const TilePlace first = first_of_tile<V>(a.tiles);
  const int64_t i0 = first.i0;
  const int64_t last = first.n + a.tiles.rows < a.shape.n1 ? first.n + a.tiles.rows : a.shape.n1;
  const int row = int(threadIdx.x) >> lanes_log2, lane = int(threadIdx.x) & (lanes - 1);
  // A logit's total is this thread's own until the end.
  for (int i = int(threadIdx.x); i < rows * a.gates; i += kRowThreads)
    store_shared(totals + i, 0.0f);
  for (int64_t begin = first.n; begin < last; begin += rows) {
    fill_tables(a, tables, rows, i0, begin, last);
    for (int k = 0; k < a.K; k += kFuseBatch) {
      float sums[kFuseBatch] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (begin + row < last)
        fuse_row_batch<T, V>(a, {i0, begin + row, 0}, lane, lanes, tables.weights + row * a.K, k,
                             sums);
      if (!a.need_dlogits) continue;
      team_sums<kFuseBatch>(sums, lanes_log2, buffer);
#pragma unroll
      for (int j = 0; j < kFuseBatch; ++j)
        if (lane == 0 && k + j < a.K) store_shared(products + row * a.K + k + j, sums[j]);
    }
    if (!a.need_dlogits) continue;
    sync_threads();
    for (int i = int(threadIdx.x); i < rows * a.gates; i += kRowThreads) {
      const int r = i / a.gates, k = i - r * a.gates;
      if (begin + r >= last) continue;
      const float dlogit[1] = {fuse_logit_gradient(a, tables, products, r, k)};
      if (a.sums)
        store_shared(totals + i, load_shared(totals + i) + dlogit[0]);
      else
        store_side<T, 1>(a.dlogits.data, a.dlogits.dtype,
                         row_offset(a.dlogits, i0, begin + r) + k * a.dlogits_k, dlogit);
    }
  }
  if (!a.sums) return;
  sync_threads();
  for (int k = int(threadIdx.x); k < a.gates; k += kRowThreads) {
    float total = 0.0f;
    for (int r = 0; r < rows; ++r) total += load_shared(totals + r * a.gates + k);
    store_global(a.parts + int64_t(blockIdx.x) * a.gates + k, total);
  }
}

// ---- logits with channels -----------------------------------------------------------------------

// What the softmax of V channels of a row comes to: the sums, and the mean of d by the weights.
template <int V>
struct FuseChannels {
  SoftmaxSum softmax[V];
  float scale[V], mean[V];
};

template <class T, int V>
MMFAST_DEVICE void fuse_softmax(const FuseLaunch& a, const TilePlace& at, int64_t left,
                                const Piece<T, V>& dout, FuseChannels<V>& s) {
#pragma unroll
  for (int v = 0; v < V; ++v) s.mean[v] = 0.0f;
  for (int k = 0; a.mode == FuseKind::SOFTMAX && k < a.K; ++k) {
    if (!is_there(a, at.i0, at.n, k)) continue;
    float logits[V];
    load_logits<T, V>(a, at, k, left, logits);
    const Piece<T, V> x = load_feature<T, V, false>(a, at, k, left, a.need_dlogits);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const auto step = s.softmax[v].add(logits[v]);
      s.mean[v] = s.mean[v] * step.kept + step.share * mul_rn(dout.get(v), x.get(v));
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) s.scale[v] = s.softmax[v].scale(), s.mean[v] *= s.scale[v];
}

// dx_k and dl_k of V channels of a row, for a batch of modalities. SUM: dl_k is added to `totals`,
// a pair's to the first of them.
template <class T, int V, bool SUM>
MMFAST_DEVICE void fuse_channel_batch(const FuseLaunch& a, const TilePlace& at, int64_t left,
                                      const Piece<T, V>& dout, const FuseChannels<V>& s, int first,
                                      float (&totals)[kFuseBatch][V]) {
  Piece<T, V> x[kFuseBatch];
  bool there[kFuseBatch];
#pragma unroll
  for (int j = 0; j < kFuseBatch; ++j) {
    there[j] = first + j < a.K && is_there(a, at.i0, at.n, first + j);
    x[j] = load_feature<T, V, false>(a, at, first + j, left, there[j]);
  }
  const bool is_pair = a.mode == FuseKind::PAIR;
  float dpair[V];
#pragma unroll
  for (int v = 0; v < V; ++v) dpair[v] = 0.0f;
#pragma unroll
  for (int j = 0; j < kFuseBatch; ++j) {
    const int k = first + j;
    if (k >= a.K) continue;
    float dx[V], dlogits[V];
#pragma unroll
    for (int v = 0; v < V; ++v) dx[v] = dlogits[v] = 0.0f;
    if (there[j]) {
      float logits[V];
      load_logits<T, V>(a, at, k, left, logits);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float d = dout.get(v);
        float value = x[j].get(v), inner = 1.0f;
        if (fuse_has_tanh(a.mode)) value = device_tanhf(value), inner = 1.0f - value * value;
        if (a.mode == FuseKind::SOFTMAX) {
          const float weight = s.softmax[v].weight(logits[v], s.scale[v]);
          dx[v] = d * weight * inner;
          // Rounded like those in the mean: where one modality takes all they cancel.
          const float distance = mul_rn(d, value) - s.mean[v];
          dlogits[v] = s.softmax[v].fixed(weight) ? 0.0f : weight * distance;
        } else {
          const float weight = gate_sigmoid(logits[v]), slope = weight * gate_sigmoid(-logits[v]);
          dx[v] = d * weight * inner;
          dlogits[v] = (is_pair && k == 1 ? -slope : slope) * (d * value);
        }
      }
    }
    if (a.need_dx) store_vector<T, V>(fuse_pointer<T>(a.dx[k], at), left, dx);
    if (!a.need_dlogits) continue;
    if (is_pair) {
#pragma unroll
      for (int v = 0; v < V; ++v) dpair[v] += dlogits[v];
    } else if (SUM) {
#pragma unroll
      for (int v = 0; v < V; ++v) totals[j][v] += dlogits[v];
    } else {
      const int64_t to = row_offset(a.dlogits, at.i0, at.n) + k * a.dlogits_k + at.c;
      store_side<T, V>(a.dlogits.data, a.dlogits.dtype, to, left, dlogits);
    }
  }
  if (!is_pair || !a.need_dlogits) return;
  if constexpr (SUM) {
#pragma unroll
    for (int v = 0; v < V; ++v) totals[0][v] += dpair[v];
  } else {
    const int64_t to = row_offset(a.dlogits, at.i0, at.n) + at.c;
    store_side<T, V>(a.dlogits.data, a.dlogits.dtype, to, left, dpair);
  }
}

// A block takes a chunk of rows and 2^columns_log2 vectors of each; its other threads lie along the
// rows. SUM: dlogits are sums over rows, and the softmax is made again for each batch of
// modalities.
template <class T, bool WIDE, bool SUM>
MMFAST_KERNEL(kRowThreads, 3)
fuse_bwd_channels_kernel(MMFAST_PARAM(FuseLaunch) a) {
  constexpr int V = kVector<T, WIDE>;
  const int log2 = a.tiles.columns_log2, thread_rows = kRowThreads >> log2;
  const TilePlace first = first_of_tile<V>(a.tiles);
  const TilePlace mine = place_in_tile<V>(a.tiles, first, int(threadIdx.x));
  const int64_t left = a.shape.columns - mine.c;
  const int64_t last = first.n + a.tiles.rows < a.shape.n1 ? first.n + a.tiles.rows : a.shape.n1;
  float totals[kFuseBatch][V];
  if constexpr (!SUM) {
    if (mine.n >= last || left <= 0) return;
    const Piece<T, V> dout = load_piece<T, V>(fuse_pointer<const T>(a.dout, mine), left);
    FuseChannels<V> s;
    fuse_softmax<T, V>(a, mine, left, dout, s);
    for (int k = 0; k < a.K; k += kFuseBatch)
      fuse_channel_batch<T, V, SUM>(a, mine, left, dout, s, k, totals);
  } else {
    SharedMemory shared;
    float* buffer = shared.take<float>(V * kRowThreads);
    for (int k = 0; k < a.K; k += kFuseBatch) {
#pragma unroll
      for (int j = 0; j < kFuseBatch; ++j)
#pragma unroll
        for (int v = 0; v < V; ++v) totals[j][v] = 0.0f;
      for (TilePlace at = mine; left > 0 && at.n < last; at.n += thread_rows) {
        const Piece<T, V> dout = load_piece<T, V>(fuse_pointer<const T>(a.dout, at), left);
        FuseChannels<V> s;
        fuse_softmax<T, V>(a, at, left, dout, s);
        fuse_channel_batch<T, V, SUM>(a, at, left, dout, s, k, totals);
      }
#pragma unroll
      for (int j = 0; j < kFuseBatch; ++j) {
        sum_over_rows<V>(totals[j], log2, buffer);
        if (k + j >= a.gates || int(threadIdx.x) >> log2 != 0) continue;
        const int64_t part = int64_t(blockIdx.x) / a.tiles.tiles_c * a.gates + k + j;
        if (left > 0) store_partials<V>(a.parts, part, a.shape.columns, mine.c, totals[j]);
      }
    }
  }
}

// ---- launching ----------------------------------------------------------------------------------

template <class T, bool WIDE>
void fuse_bwd(const FuseLaunch& a, const Stream& stream) {
  const Grid grid = {a.tiles.blocks(a.shape), 1, 1};
  if (!a.per_channel) {
    const int64_t shared = 4 * shared_bytes<float>(fuse_team_rows(a.tiles) * a.K) +
                           shared_bytes<float>(kTeamSumFloats<kFuseBatch>);
    launch<fuse_bwd_rows_kernel<T, WIDE>>(grid, kRowThreads, shared, stream, a);
  } else if (a.sums) {
    constexpr int64_t kShared = shared_bytes<float>(kVector<T, WIDE> * kRowThreads);
    launch<fuse_bwd_channels_kernel<T, WIDE, true>>(grid, kRowThreads, kShared, stream, a);
  } else {
    launch<fuse_bwd_channels_kernel<T, WIDE, false>>(grid, kRowThreads, 0, stream, a);
  }
}

template <class T>
constexpr FuseCuda fuse_cuda() {
  return {[](const FuseLaunch& a, const Stream& stream) {
            a.tiles.wide ? fuse_fwd<T, true>(a, stream) : fuse_fwd<T, false>(a, stream);
          },
          [](const FuseLaunch& a, const Stream& stream) {
            a.tiles.wide ? fuse_bwd<T, true>(a, stream) : fuse_bwd<T, false>(a, stream);
          }};
}

}  // namespace mmfast
