// What the bindings and the CPU kernels of fuse agree on: raw pointers, strides in elements, and
// the plan that forward and backward follow.
#pragma once
#include "rows.h"

namespace mmfast {

constexpr int64_t kFuseMost = 64;  // modalities

enum FuseMode : int { kFuseSoftmax = 0, kFuseSigmoid, kFuseGmu, kFusePair };

// Which rows share their logits. It decides the order in which rows are taken: those that share
// lie in one group, so that weights are made once and the gradient of the logits is summed as it
// comes.
enum class FuseSharing : int {
  NOTHING,  // every row has its own
  ITEM,     // the rows of an item
  PLACE,    // the rows (b, n) with the same n
  ALL
};

struct FuseArgs {
  int64_t B = 0, N = 0, C = 0;
  int64_t K = 0;      // modalities
  int64_t gates = 0;  // logits of a row and channel: K, or 1 in mode kFusePair
  int mode = kFuseSoftmax;
  const RowOperand* features = nullptr;  // [K]
  const uint8_t* present = nullptr;      // [B,K]; null = all are
  RowOperand logits;                     // (b, n, k, c), c only where per_channel
  int64_t logits_k = 0;                  // stride of k
  bool per_channel = false;

  RowOperand out;                         // forward
  RowOperand dout;                        // backward
  const RowOperand* dfeatures = nullptr;  // [K]; null = not wanted
  bool need_dlogits = false;
  void* dlogits = nullptr;  // [B,N,gates,C or 1] in the dtype of logits; only with NOTHING
  // [groups,chunks,gates,C or 1] in the compute type: what each task adds to the gradient of the
  // logits that its rows share.
  void* dlogits_parts = nullptr;

  // Rows are numbered group after group; a task is `chunk` rows of one group.
  FuseSharing sharing = FuseSharing::NOTHING;
  bool items_inner = false;  // row r is (r % B, r / B), not (r / N, r % N)
  int64_t groups = 0, group_rows = 0, chunk = 0, chunks = 0;
  // The rows of a task have the same scalar weights and lie one after the other in every tensor:
  // they are taken as one long row.
  bool one_run = false;
  bool past_caches = false;  // results are written past them
};

struct FuseKernels {
  int64_t (*scratch)(const FuseArgs&);  // bytes that a thread needs
  void (*fwd)(const FuseArgs&, int64_t task, void* scratch);
  void (*bwd)(const FuseArgs&, int64_t task, void* scratch);
  // out[i] = sum over the slots s of parts[s * stride + i], i < count
  void (*sum)(const void* parts, int64_t slots, int64_t stride, int64_t count, void* out,
              DType dtype);
};

struct FuseTable {
  FuseKernels f32, bf16, f16, f64;  // by storage
};

extern const FuseTable fuse_generic;
#if defined(__x86_64__)
extern const FuseTable fuse_avx2;
extern const FuseTable fuse_avx512;
extern const FuseKernels fuse_avx512_bf16;  // for bf16, with the processor's own rounding to it
#endif

}  // namespace mmfast
