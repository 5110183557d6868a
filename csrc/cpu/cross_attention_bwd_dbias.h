// The pass of the backward for the gradient of a bias that is summed over items or heads and has
// both row and key dims: a task owns a tile of the result.
#pragma once
#include "cross_attention_bwd.h"

namespace {

template <class C>
int64_t bwd_dbias_tasks(const CrossAttentionArgs& a) {
  return (a.dbias_has_b ? a.B : 1) * (a.dbias_has_h ? a.H : 1) * ceil_div(a.N, kTileQueries) *
         ceil_div(a.M, kTileKeys);
}

template <class C>
MMFAST_NOINLINE void bwd_dbias_run(const CrossAttentionArgs& a, int64_t task, void* base) {
  using Acc = typename C::Acc;
  const BwdScratch<C> x(a, base);
  const int64_t key_blocks = ceil_div(a.M, kTileKeys), row_blocks = ceil_div(a.N, kTileQueries);
  const int64_t m0 = task % key_blocks * kTileKeys;
  const int64_t n0 = task / key_blocks % row_blocks * kTileQueries;
  const int64_t bh = task / key_blocks / row_blocks, heads = a.dbias_has_h ? a.H : 1;
  const int64_t ob = bh / heads, oh = bh % heads;
  const int64_t width = min64(kTileKeys, a.M - m0), rows = min64(kTileQueries, a.N - n0);
  memset(x.dbias, 0, size_t(kTileQueries * kTileKeys) * sizeof(Acc));
  for (int64_t b = a.dbias_has_b ? ob : 0; b < (a.dbias_has_b ? ob + 1 : a.B); ++b) {
    const int64_t keys = min64(valid_keys(a, b), m0 + width);
    const int64_t count = min64(valid_queries(a, b) - n0, rows);
    if (keys <= m0 || count <= 0) continue;
    for (int64_t h = a.dbias_has_h ? oh : 0; h < (a.dbias_has_h ? oh + 1 : a.H); ++h) {
      const KeyBlock kb = key_block<C>(b, h / (a.H / a.G), m0, keys);
      for (int64_t r = 0; r < count; ++r) x.rows[r] = make_row(a, b, h, n0 + r);
      if (has_conditions(a)) seen_keys<Acc>(a, x.rows, count, m0, kb.cols, x.seen);
      bwd_pack_keys<C>(a, x, kb, has_conditions(a));
      const TileRows<C> t = bwd_pack_rows<C>(a, x, count);
      bwd_tile<C, false>(a, x, kb, t);
      for (int64_t i = 0; i < count * kTileKeys; i += kTileKeys)
        for (int64_t c = 0; c < kb.here; ++c) x.dbias[i + c] += x.dp[i + c];
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = ob * a.dbias.sb + oh * a.dbias.sh + (n0 + r) * a.dbias.sn + m0;
    write_row<Acc>(a.dbias.dtype, byte_offset(a.dbias.data, a.dbias.dtype, at),
                   x.dbias + r * kTileKeys, width, Acc(1));
  }
}

}  // namespace
