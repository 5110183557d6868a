// How the rows of attention are cut into tiles. Plain C++17: launchers and kernels.
#pragma once
#include <stdint.h>

namespace mmfast {

// How tiles of rows lie over the heads of one key head. packed: row r of the tiles is head r / N,
// query r % N, which is worth it where a head has fewer rows than a tile; otherwise no tile spans
// two heads.
struct QueryTiles {
  int32_t heads = 1, N = 0, each = 0, count = 0;  // `each` tiles a head, `count` in all
  bool packed = false;
};

inline QueryTiles query_tiles(int32_t heads, int32_t N, int32_t rows) {
  QueryTiles t;
  t.heads = heads, t.N = N;
  t.packed = heads > 1 && rows > N;
  t.each = t.packed ? 1 : (N + rows - 1) / rows;
  t.count = t.packed ? int32_t((int64_t(heads) * N + rows - 1) / rows) : heads * t.each;
  return t;
}

}  // namespace mmfast
