#include "cross_attention_dbias.cuh"

#include "cross_attention.h"
#include "launch.cuh"

namespace mmfast {

void cross_attention_dbias_rows(const AttentionArgs& a, const float* row_sums,
                                const Stream& stream) {
  DbiasRows x;
  x.sums = row_sums;
  x.B = a.rules.B, x.H = a.rules.H, x.N = a.rules.N;
  // A stride of 0 is a dim of size 1.
  x.items = a.dbias.sb == 0 ? 1 : x.B;
  x.heads = a.dbias.sh == 0 ? 1 : x.H;
  x.rows = a.dbias.sn == 0 ? 1 : x.N;
  x.out = a.dbias.data, x.out_dtype = a.dbias.dtype;
  const int64_t size = int64_t(x.items) * x.heads * x.rows;
  const int64_t blocks = x.rows == x.N ? (size + kDbiasThreads - 1) / kDbiasThreads : size;
  launch<cross_attention_dbias_rows_kernel>({blocks, 1, 1}, kDbiasThreads,
                                            shared_bytes<float>(kDbiasThreads), stream, x);
}

}  // namespace mmfast
