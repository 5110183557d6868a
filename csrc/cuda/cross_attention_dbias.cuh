// The gradient of a bias without the keys' dim, of the sums of dS over the keys of each row. One
// instance.
#pragma once
#include "attention_rules.cuh"
#include "compensated_sum.cuh"

namespace mmfast {

constexpr int kDbiasThreads = 256;

// out[item, head, n] = the sum of sums[B, H, N] over what the result does not have: `items` is B or
// 1, `heads` H or 1, `rows` N or 1.
struct DbiasRows {
  const float* sums = nullptr;
  int32_t B = 0, H = 0, N = 0;
  int32_t items = 1, heads = 1, rows = 1;
  void* out = nullptr;
  DType out_dtype = DType::F32;
};

// With rows in the result a thread has one of its elements; otherwise a block has one, thread i
// adds the terms i, i + 256, ..., and the threads' sums are added pairwise.
MMFAST_KERNEL(kDbiasThreads, 2) cross_attention_dbias_rows_kernel(MMFAST_PARAM(DbiasRows) a) {
  SharedMemory shared;
  float* partial = shared.take<float>(kDbiasThreads);
  const int thread = int(threadIdx.x);
  const bool by_row = a.rows == a.N;
  const int64_t size = int64_t(a.items) * a.heads * a.rows;
  const int64_t i = by_row ? int64_t(blockIdx.x) * kDbiasThreads + thread : int64_t(blockIdx.x);
  const int64_t outer = i / a.rows, item = outer / a.heads, head = outer % a.heads;
  const int64_t items = a.items == 1 ? a.B : 1, heads = a.heads == 1 ? a.H : 1;
  CompensatedSum sum;
  if (by_row) {
    if (i >= size) return;
    for (int64_t b = item; b < item + items; ++b)
      for (int64_t h = head; h < head + heads; ++h)
        sum.add(load_global(a.sums + (b * a.H + h) * a.N + i % a.rows));
    store_number(a.out, a.out_dtype, i, sum.total());
    return;
  }
  // The heads of an item that are summed, and their rows, lie one after the other.
  for (int64_t b = item; b < item + items; ++b) {
    const float* from = a.sums + (b * a.H + head) * a.N;
    for (int64_t term = thread; term < heads * a.N; term += kDbiasThreads)
      sum.add(load_global(from + term));
  }
  float total = sum.total();
  store_shared(partial + thread, total);
  for (int half = kDbiasThreads / 2; half > 0; half /= 2) {
    sync_threads();
    if (thread < half) {
      total += load_shared(partial + thread + half);
      store_shared(partial + thread, total);
    }
  }
  if (thread == 0) store_number(a.out, a.out_dtype, i, total);
}

}  // namespace mmfast
