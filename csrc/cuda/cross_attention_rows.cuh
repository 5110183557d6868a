// cross_attention, backward, before the passes: delta = rowsum(dout * out) - dlse, and where there
// is a gate its gradient and dout * sigmoid(gate), which is what the passes take for dout. The
// ungated output is not needed: rowsum(do * o) = rowsum(dout * out), dgate = dout * out * (1 -
// sigmoid(gate)). After them: the sums of partial sums.
#pragma once
#include "attention_rules.cuh"
#include "launch.cuh"

namespace mmfast {

constexpr int kRowsWarps = 4;

template <class T>
struct Chunk {
  static constexpr int COUNT = 16 / int(sizeof(T));
  float x[COUNT];
};

// Elements [first, first + COUNT) of a row, zeros from `width` on.
template <class T>
MMFAST_DEVICE Chunk<T> load_chunk(const T* row, int first, int width, bool wide) {
  Chunk<T> chunk;
  if (wide) {
    const Vec4 raw = load_global(reinterpret_cast<const Vec4*>(row + first));
    MMFAST_UNROLL
    for (int i = 0; i < Chunk<T>::COUNT; ++i) {
      if constexpr (sizeof(T) == 4)
        chunk.x[i] = as_float(raw.x[i]);
      else
        chunk.x[i] = i % 2 == 0 ? lo2<T>(raw.x[i / 2]) : hi2<T>(raw.x[i / 2]);
    }
  } else {
    MMFAST_UNROLL
    for (int i = 0; i < Chunk<T>::COUNT; ++i)
      chunk.x[i] = first + i < width ? to_float(load_global(row + first + i)) : 0.0f;
  }
  return chunk;
}

template <class T>
MMFAST_DEVICE void store_chunk(T* row, int first, int width, bool wide, const Chunk<T>& chunk) {
  if (wide) {
    Vec4 raw;
    MMFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4)
        raw.x[i] = as_bits(chunk.x[i]);
      else
        raw.x[i] = pack2<T>(chunk.x[2 * i], chunk.x[2 * i + 1]);
    }
    store_global(reinterpret_cast<Vec4*>(row + first), raw);
  } else {
    MMFAST_UNROLL
    for (int i = 0; i < Chunk<T>::COUNT; ++i)
      if (first + i < width) store_global(row + first + i, from_float<T>(chunk.x[i]));
  }
}

// `lanes` neighbouring lanes, a power of two, take a row. Rows are counted in the order of the
// LSEs.
template <class T>
MMFAST_KERNEL(32 * kRowsWarps, 8)
cross_attention_rows_kernel(MMFAST_PARAM(AttentionArgs) a, MMFAST_PARAM(int) lanes) {
  constexpr int COUNT = Chunk<T>::COUNT;
  const AttentionRules& r = a.rules;
  const int64_t rows = int64_t(r.B) * r.H * r.N, each = kRowsWarps * 32 / lanes;
  const int64_t index = int64_t(blockIdx.x) * each + int(threadIdx.x) / lanes;
  const int64_t at = index < rows ? index : 0;
  const int32_t n = int32_t(at % r.N), h = int32_t(at / r.N % r.H), b = int32_t(at / r.N / r.H);
  const bool inside = index < rows && n < query_places(r, lengths(r, b));
  const bool live = inside && load_global(a.lse + at) != kMinusInfinity;
  const int32_t place = start_of(r.q_starts, b) + n;
  const bool gated = a.gate.data != nullptr, of_channels = gated && a.gate.sm != 0;
  const int64_t gate = gated ? pairs_row(a.gate, b, h, place) : 0;
  const float of_row =
      gated && live && !of_channels ? sigmoid(load_number(a.gate.data, a.gate.dtype, gate)) : 0.0f;
  float sum = 0;
  for (int first = int(threadIdx.x) % lanes * COUNT; first < a.Dv; first += lanes * COUNT) {
    Chunk<T> in = {}, product = {};
    if (live) {
      in = load_chunk(row_of<const T>(a.dout, b, h, place), first, a.Dv, a.dout.wide);
      product = load_chunk(row_of<const T>(a.out, b, h, place), first, a.Dv, a.out.wide);
    }
    MMFAST_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      product.x[i] *= in.x[i];
      sum += product.x[i];
    }
    if (!gated || !inside) continue;
    const int64_t to = of_channels ? pairs_row(a.dgate, b, h, place) + first : 0;
    MMFAST_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      float weight = of_row;
      if (of_channels && first + i < a.Dv) {
        weight = live ? sigmoid(load_number(a.gate.data, a.gate.dtype, gate + first + i)) : 0.0f;
        store_number(a.dgate.data, a.dgate.dtype, to + i, product.x[i] * (1.0f - weight));
      }
      in.x[i] *= weight;
    }
    store_chunk(row_of<T>(a.dout_gated, b, h, place), first, a.Dv, a.dout_gated.wide, in);
  }
  for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (!inside || int(threadIdx.x) % lanes != 0) return;
  if (gated && !of_channels)
    store_number(a.dgate.data, a.dgate.dtype, pairs_row(a.dgate, b, h, place),
                 sum * (1.0f - of_row));
  if (a.dlse != nullptr && live) sum -= load_global(a.dlse + at);
  store_global(a.delta + at, sum);
}

template <class T>
void launch_rows(const AttentionArgs& a, const Stream& stream) {
  int lanes = 1;
  while (lanes < 32 && lanes * Chunk<T>::COUNT < a.Dv) lanes *= 2;
  const int64_t each = kRowsWarps * 32 / lanes;
  const int64_t rows = int64_t(a.rules.B) * a.rules.H * a.rules.N;
  launch<cross_attention_rows_kernel<T>>({(rows + each - 1) / each}, 32 * kRowsWarps, 0, stream, a,
                                         lanes);
}

// ---- sums of splits -----------------------------------------------------------------------------

// result (b, h, n, :) = factor * the sum of `splits` rows [splits, B, H, N, width], in order. A
// packed result has `lens` and `starts`, see AttentionRules.
struct SplitSums {
  const float* partial = nullptr;
  AttentionTensor result;
  const int32_t *lens = nullptr, *starts = nullptr;
  DType dtype = DType::F32;
  int32_t B = 0, H = 0, N = 0, width = 0, splits = 0;
  float factor = 1;
};

MMFAST_KERNEL(32 * kRowsWarps, 8) add_splits_kernel(MMFAST_PARAM(SplitSums) s) {
  const int64_t rows = int64_t(s.B) * s.H * s.N;
  const int64_t row = int64_t(blockIdx.x) * kRowsWarps + warp_id();
  if (row >= rows) return;
  const int32_t n = int32_t(row % s.N), h = int32_t(row / s.N % s.H), b = int32_t(row / s.N / s.H);
  if (s.starts != nullptr && n >= length(s.lens, b, s.N)) return;
  const int64_t to = int64_t(b) * s.result.sb + int64_t(h) * s.result.sh +
                     (int64_t(start_of(s.starts, b)) + n) * s.result.sn;
  for (int32_t c = lane_id(); c < s.width; c += 32) {
    float sum = 0;
    for (int32_t i = 0; i < s.splits; ++i)
      sum += load_global(s.partial + (i * rows + row) * s.width + c);
    store_number(s.result.data, s.dtype, to + c, sum * s.factor);
  }
}

inline void add_splits(const SplitSums& s, const Stream& stream) {
  const int64_t rows = int64_t(s.B) * s.H * s.N;
  launch<add_splits_kernel>({(rows + kRowsWarps - 1) / kRowsWarps}, 32 * kRowsWarps, 0, stream, s);
}

}  // namespace mmfast
