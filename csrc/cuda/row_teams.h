// How the normalising ops deal rows to threads. Plain C++: launchers and the bindings that make
// their workspaces.
//
// A team is a power of two of lanes that holds a row in registers, HELD elements a lane; a block is
// one team, or several teams of one row each. A row that is too long for a team is cut into tiles
// of columns.
#pragma once
#include "../cpu/rows.h"

namespace mmfast {

enum class RowNorm : int32_t { NONE = 0, LAYER, RMS };

constexpr int32_t kTeamLanes = 512;  // at most: a block

struct RowTeams {
  int32_t lanes = 1, threads = 1, count = 1;  // of a team, of a block; teams of a block
  int64_t tile = 1, tiles = 1;  // columns that a team holds, and how many times that is a row
};

// For `rows` rows of `columns`, `held` elements a lane, in blocks of at most `threads` or, for
// longer rows, of one team. From the shape alone.
inline RowTeams row_teams(int64_t columns, int64_t rows, int32_t held, int32_t threads) {
  RowTeams t;
  while (t.lanes < kTeamLanes && int64_t(t.lanes) * held < columns) t.lanes *= 2;
  t.threads = t.lanes > threads ? t.lanes : threads;
  while (t.threads > 32 && t.threads > t.lanes && t.threads / t.lanes / 2 >= rows) t.threads /= 2;
  t.count = t.threads / t.lanes;
  t.tile = int64_t(t.lanes) * held;
  t.tiles = (columns + t.tile - 1) / t.tile;
  return t;
}

// Rows whose columns a block sums, out of groups of `group_rows`: enough blocks for any GPU, few
// enough that their partial sums cost little beside the rows. From the shape alone.
inline int64_t summed_rows(int64_t groups, int64_t group_rows, const RowTeams& teams,
                           int64_t column_blocks) {
  constexpr int64_t kBlocks = 512, kLeast = 4;
  const int64_t each = kBlocks / (groups * column_blocks), wanted = each > 1 ? each : 1;
  const int64_t steps = (group_rows + teams.count - 1) / teams.count;
  const int64_t a_block = (steps + wanted - 1) / wanted;
  const int64_t rows = (a_block > kLeast ? a_block : kLeast) * teams.count;
  return rows < group_rows ? rows : group_rows > 0 ? group_rows : 1;
}

}  // namespace mmfast
