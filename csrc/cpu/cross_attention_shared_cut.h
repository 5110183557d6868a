// How attention over shared keys and values (v = None) is cut into tasks. By shapes alone, so that
// neither the number of threads nor the instruction set changes where a sum is split.
#pragma once
#include "cross_attention.h"

namespace mmfast {

// Ranges and blocks of keys begin at multiples of this: whole vectors, whole words of dropout.
constexpr int64_t kSharedAlign = 16;

inline int64_t shared_rows(const CrossAttentionArgs& a) { return a.H / a.G * a.N; }

// Rows that a task of the forward takes: their queries and outputs stay in the second-level cache.
inline int64_t shared_rows_most(const CrossAttentionArgs& a) {
  const int64_t fit = (int64_t(768) << 10) / (8 * (a.D > 0 ? a.D : 1)) / 16 * 16;
  return fit < 16 ? 16 : fit > 64 ? 64 : fit;
}
inline int64_t shared_row_chunks(const CrossAttentionArgs& a) {
  const int64_t most = shared_rows_most(a), chunks = (shared_rows(a) + most - 1) / most;
  return chunks < 1 ? 1 : chunks;
}
// The most rows of a chunk, once they are cut evenly.
inline int64_t shared_chunk_rows(const CrossAttentionArgs& a) {
  const int64_t chunks = shared_row_chunks(a);
  return (shared_rows(a) + chunks - 1) / chunks;
}

// [0, length) in `pieces` of nearly the same size: where piece i begins.
inline int64_t shared_cut(int64_t length, int64_t pieces, int64_t i) {
  return i >= pieces ? length : i * length / pieces / kSharedAlign * kSharedAlign;
}

// Cuts the keys into a.key_chunks ranges while there are fewer tasks than `enough`.
inline void cut_shared_keys(CrossAttentionArgs& a, int64_t tasks, int64_t enough,
                            int64_t fewest_keys) {
  a.key_chunks = 1;
  while (a.key_chunks * tasks < enough && a.M / (2 * a.key_chunks) >= fewest_keys)
    a.key_chunks *= 2;
  a.chunk_keys = (a.M + a.key_chunks - 1) / a.key_chunks;
}
inline void cut_shared_forward(CrossAttentionArgs& a) {
  cut_shared_keys(a, a.B * a.G * shared_row_chunks(a), 16, 64);
}
// Each range of keys has a dq of its own, [rows, D], that is written and read once more.
inline void cut_shared_backward(CrossAttentionArgs& a) {
  const bool many_rows = shared_rows(a) > 64;
  cut_shared_keys(a, a.B * a.G, many_rows ? 8 : 16, many_rows ? 128 : 64);
}

// A row of a.out_part: outputs over 2^top up to round_up(D, 16), then top and the sum.
inline int64_t shared_part_width(const CrossAttentionArgs& a) { return (a.D + 15) / 16 * 16 + 16; }

}  // namespace mmfast
