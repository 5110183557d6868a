// What the binding and the CUDA launchers of fuse agree on: the gated sum of K modalities. Plain
// C++17.
#pragma once
#include "row_tiles.h"
#include "stream.h"

namespace mmfast {

constexpr int32_t kFuseModalities = 64;

enum class FuseKind : int32_t { SOFTMAX = 0, SIGMOID, GMU, PAIR };

// Rows of one modality. The launch's dtype, dense channels.
struct FuseRows {
  void* data = nullptr;
  int64_t s0 = 0, s1 = 0;
};

// A kernel's one parameter, of less than the 4 KiB that every driver passes.
struct FuseLaunch {
  RowShape shape;
  RowTiles tiles;
  DType dtype = DType::F32;  // of the data; the logits' may be F32
  FuseKind mode = FuseKind::SOFTMAX;
  int32_t K = 0, gates = 0;  // modalities; logits of a row and channel: K, or 1 for a pair
  bool per_channel = false;
  bool sums = false;   // dlogits are sums over the rows of an item i0
  RowOperand logits;   // sc = 0 and one value a row where there are no channels
  RowOperand present;  // one byte a row, `present_k` apart; data null: all are there
  int64_t logits_k = 0, dlogits_k = 0;

  FuseRows out, dout;
  FuseRows x[kFuseModalities], dx[kFuseModalities];
  bool need_dx = false, need_dlogits = false;
  RowOperand dlogits;      // like the logits; not where they are summed
  float* parts = nullptr;  // sums: [n0 * tiles_n, gates, columns or 1]
};
static_assert(sizeof(FuseLaunch) <= 4096);

// Floats of one table of a block: a number for each of its rows and modalities.
constexpr int64_t kFuseTable = 2048;

struct FuseCuda {
  void (*fwd)(const FuseLaunch&, const Stream&);
  void (*bwd)(const FuseLaunch&, const Stream&);
};
extern const FuseCuda fuse_cuda_f32, fuse_cuda_bf16, fuse_cuda_f16;  // by storage of the data

// ---- tiles, before a launch ---------------------------------------------------------------------

inline RowOperand fuse_operand(const FuseRows& x, DType dtype) {
  return {x.data, x.s0, x.s1, 1, dtype, false};
}

inline bool fuse_is_wide(const FuseLaunch& a, bool backward) {
  const auto wide = [&](const FuseRows& x) {
    return wide_access(fuse_operand(x, a.dtype), a.shape);
  };
  const auto side = [&](const RowOperand& x, int64_t k) {
    return x.data == nullptr || !a.per_channel ||
           (wide_access(x, a.shape) && (a.gates == 1 || k % (16 / dtype_bytes(x.dtype)) == 0));
  };
  bool all =
      wide(backward ? a.dout : a.out) && side(a.logits, a.logits_k) && side(a.dlogits, a.dlogits_k);
  for (int32_t k = 0; k < a.K; ++k) all = all && wide(a.x[k]) && wide(a.dx[k]);
  return all;
}

inline void plan_fuse_fwd(FuseLaunch& a) {
  const bool wide = fuse_is_wide(a, false);
  a.tiles = element_tiles(a.shape, a.dtype, wide);
  if (!a.per_channel && a.tiles.rows * a.K > kFuseTable) {
    a.tiles.rows = kFuseTable / a.K;
    a.tiles.tiles_n = uint32_t(ceil_div(a.shape.n1, a.tiles.rows));
  }
}

// Rows that a block of the backward takes at a time, where logits have no channels.
inline int64_t fuse_team_rows(const RowTiles& t) { return kRowThreads >> t.columns_log2; }

inline void plan_fuse_bwd(FuseLaunch& a) {
  const bool wide = fuse_is_wide(a, true);
  if (a.per_channel) {
    a.tiles = sum_tiles(a.shape, a.dtype, wide);
    if (a.sums) return;
    a.tiles.rows = fuse_team_rows(a.tiles);  // nothing is summed: a block's threads, one row each
  } else {
    int least = 0;  // lanes of a row, so that the rows' tables fit
    while ((kRowThreads >> least) * a.K > kFuseTable) ++least;
    a.tiles = team_tiles(a.shape, a.dtype, wide, least);
    if (a.sums) a.tiles.rows = rows_of_sum(a.shape.n1, a.shape.n0, a.tiles.rows);
  }
  a.tiles.tiles_n = uint32_t(ceil_div(a.shape.n1, a.tiles.rows));
}

}  // namespace mmfast
