// What the bindings and the CPU kernels of cross_attention agree on: raw pointers, strides in
// elements, and one table of entry points per instruction set.
#pragma once
#include <stdint.h>

#include "../common/cross_attention_problem.h"

namespace mmfast {

struct CrossAttentionArgs : CrossAttentionProblem {
  bool shared_kv = false;  // the keys are the values: dk is the whole gradient, dv is absent
  Strided out;
  void* lse = nullptr;       // [B,H,N], float (double for double storage)
  void* out_part = nullptr;  // shared_kv with several ranges of keys: see shared_part_width

  // Probabilities after the fact (cross_attention_probs).
  void* importance = nullptr;  // [B,H,M]
  Strided weights;             // (b, h, n, :) over M; sh = 0 for the mean over heads
  bool weights_mean = false;

  // Ranges of keys that tasks take: of the backward, and of the forward with shared_kv.
  int64_t key_chunks = 1, chunk_keys = 0;

  // Backward. Buffers called *_acc are in the compute type (float, or double for double storage).
  Strided dout;                       // in; float when it is the gated gradient made by bwd_rows
  Strided dout_raw;                   // in: the incoming gradient as it came
  const void* dlse = nullptr;         // in, [B,H,N]
  void* delta = nullptr;              // [B,H,N]: rowsum(dout * out) - dlse; null without a gate
  Strided dout_gated;                 // made by bwd_rows when there is a gate
  void* dgate = nullptr;              // contiguous like the gate argument
  const void* dimportance = nullptr;  // in, [B,H,M]
  Broadcast dweights;                 // in; sh = 0 for the head mean
  Strided dq, dk, dv;
  void* dq_acc = nullptr;    // [key_chunks,B,H,N,D], or null: sums are made in dq itself
  void* dlse_out = nullptr;  // [key_chunks,B,H,N]: -rowsum(P * dP), probs backward only
  Broadcast dbias;           // strides of the result; data null = not wanted
  // How the gradient of the bias is summed: 1 = every element has one owner and is written as it
  // is made; 2 = partial sums in dbias_part ([key_chunks,B,H,N] without a key dim, [B,H,M] without
  // a row dim) and a second pass; 3 = a pass of its own over tiles of the result.
  int dbias_mode = 0;
  void* dbias_part = nullptr;
  bool dbias_has_b = false, dbias_has_h = false, dbias_has_n = false, dbias_has_m = false;
};

// Keys that the backward takes as one block.
constexpr int64_t kBackwardKeys = 144;

// So few query rows share a key/value head that nothing is packed (cross_attention_few.h).
constexpr int64_t kFewRows = 4;
inline bool few_rows(const CrossAttentionArgs& a) { return a.H / a.G * a.N <= kFewRows && a.N > 0; }
// One task writes each row of dq, once: no dq_acc.
inline bool dq_written_once(const CrossAttentionArgs& a) {
  return a.key_chunks == 1 && (a.shared_kv || few_rows(a) || a.M <= kBackwardKeys);
}

struct CrossAttentionKernels {
  // Each pass: how many independent tasks, how many bytes of scratch a thread needs, one task.
  struct Pass {
    int64_t (*tasks)(const CrossAttentionArgs&);
    int64_t (*scratch)(const CrossAttentionArgs&);
    void (*run)(const CrossAttentionArgs&, int64_t task, void* scratch);
  };
  Pass fwd;         // out, lse
  Pass fwd_merge;   // the same out of ranges of keys, where shared_kv cuts them
  Pass importance;  // column sums
  Pass weights;     // head mean or per head
  Pass bwd_rows;    // delta, gated dout, dgate; only where there is a gate
  Pass bwd;         // dq (or its chunks), dk, dv, dbias in modes 1 and 2
  Pass bwd_dq;      // dq from its chunks, where there are any
  Pass bwd_dbias;   // dbias in mode 3
};

// One per instruction set that was compiled; each holds float and double kernels.
struct CrossAttentionTable {
  CrossAttentionKernels f32;  // computes in float (or bf16 products with float sums)
  CrossAttentionKernels f64;
};

}  // namespace mmfast
