// Rows held by teams of threads: where a row is, sums over a row, its moments, and what the teams
// of a block add up column by column. What modulate and adaptation_gate share.
#pragma once
#include "device.cuh"
#include "row_teams.h"
#include "rows.cuh"

namespace mmfast {

// Row i0, i1 of [n0, n1] as the number that it has in order.
struct RowPlace {
  int64_t i0 = 0, i1 = 0;
};

MMFAST_DEVICE int64_t row_count(const RowShape& shape) { return shape.n0 * shape.n1; }

MMFAST_DEVICE RowPlace row_place(int64_t row, const RowShape& shape) {
  if (row_count(shape) <= int64_t(0xffffffffu)) {  // 32-bit division: a quarter of the time
    const uint32_t n1 = uint32_t(shape.n1), i0 = uint32_t(row) / n1;
    return {int64_t(i0), int64_t(uint32_t(row) - i0 * n1)};
  }
  const int64_t i0 = row / shape.n1;
  return {i0, row - i0 * shape.n1};
}

// Where row `at` of an operand begins, in elements.
MMFAST_DEVICE int64_t row_offset(const RowOperand& x, const RowPlace& at) {
  return row_offset(x, at.i0, at.i1);
}

// Floats of shared memory that sums over rows of COUNT numbers at a time need.
template <int COUNT>
constexpr int64_t kTeamScratch = 2 * COUNT * (kTeamLanes / 32);

// The team that this thread belongs to.
template <int COUNT>
class RowTeam {
 public:
  // `scratch`: kTeamScratch<COUNT> floats.
  MMFAST_DEVICE RowTeam(int32_t lanes, float* scratch)
      : lanes_(lanes),
        lane_(int32_t(threadIdx.x) & (lanes - 1)),
        number_(int32_t(threadIdx.x) / lanes),
        scratch_(scratch) {}

  MMFAST_DEVICE int32_t lanes() const { return lanes_; }
  MMFAST_DEVICE int32_t lane() const { return lane_; }      // in the team
  MMFAST_DEVICE int32_t number() const { return number_; }  // of the team in the block

  // x[k] becomes its sum over the team, the same bits in every lane. Every thread of the block
  // comes here. Where teams are of several warps they meet in one half of the scratch, the next
  // time in the other: nobody writes a half again before all have passed the barrier between,
  // hence have read it, and one barrier is enough.
  template <int N>
  MMFAST_DEVICE void sum(float (&x)[N]) {
    static_assert(N <= COUNT, "more numbers than there is scratch for");
    const int32_t within = lanes_ < 32 ? lanes_ : 32;
    for (int32_t mask = within / 2; mask > 0; mask /= 2) {
      MMFAST_UNROLL
      for (int k = 0; k < N; ++k) x[k] += shuffle_xor(x[k], mask);
    }
    if (lanes_ <= 32) return;
    constexpr int kWarps = kTeamLanes / 32;
    float* half = scratch_ + (odd_ ? COUNT * kWarps : 0);
    odd_ = !odd_;
    if (lane_id() == 0) {
      MMFAST_UNROLL
      for (int k = 0; k < N; ++k) store_shared(half + k * kWarps + warp_id(), x[k]);
    }
    sync_threads();
    const int32_t warps = lanes_ / 32, first = number_ * warps;
    MMFAST_UNROLL
    for (int k = 0; k < N; ++k) {
      x[k] = 0;
      for (int32_t w = 0; w < warps; ++w) x[k] += load_shared(half + k * kWarps + first + w);
    }
  }

 private:
  int32_t lanes_, lane_, number_;
  bool odd_ = false;
  float* scratch_;
};

// ---- a row in registers -------------------------------------------------------------------------

// HELD elements of a lane: ITEMS pieces of VEC neighbouring columns, the pieces a team apart.
template <int HELD, int VEC>
struct HeldRow {
  static constexpr int ITEMS = HELD / VEC;
  float x[ITEMS][VEC];
};

// The columns of a tile that a lane holds.
template <int VEC>
struct HeldColumns {
  int64_t first, columns;
  int32_t apart;
  MMFAST_DEVICE HeldColumns(int64_t tile_start, int32_t lane, int32_t lanes, int64_t all)
      : first(tile_start + int64_t(lane) * VEC), columns(all), apart(lanes * VEC) {}
  MMFAST_DEVICE int64_t at(int item) const { return first + item * apart; }
  MMFAST_DEVICE bool inside(int item) const { return at(item) < columns; }
};

// The normalised row is (x - centre) * rstd + offset. The centre is the mean as first summed; what
// is left of the mean after subtracting it is in the offset, so that a large mean costs nothing.
struct RowMoments {
  float centre = 0, rstd = 1, offset = 0;
  MMFAST_DEVICE float normal(float x) const { return (x - centre) * rstd + offset; }
};

// From the sums of x - centre and of its squares.
MMFAST_DEVICE RowMoments layer_moments(float centre, float sum, float squares, int64_t columns,
                                       float eps) {
  const float left = sum / float(columns);
  const float variance = squares / float(columns) - left * left;
  RowMoments m;
  m.centre = centre;
  m.rstd = 1.0f / sqrtf((variance < 0 ? 0.0f : variance) + eps);
  m.offset = -left * m.rstd;
  return m;
}

MMFAST_DEVICE RowMoments rms_moments(float squares, int64_t columns, float eps) {
  RowMoments m;
  m.rstd = 1.0f / sqrtf(squares / float(columns) + eps);
  return m;
}

// ---- sums over rows -----------------------------------------------------------------------------

// Sums, column by column, of the rows that the teams of a block go through. Each thread adds to
// what is its own in shared memory: in registers the sums would leave too few for the rows
// (measured with ptxas: 172 registers, where blocks of 512 threads have 128).
template <int HELD, int VEC>
class ColumnSums {
 public:
  MMFAST_DEVICE ColumnSums(const RowTeams& teams, float* memory)
      : lanes_(teams.lanes), threads_(teams.threads), memory_(memory) {}

  MMFAST_DEVICE void clear(int sum) const {
    MMFAST_UNROLL
    for (int k = 0; k < HELD; ++k) store_shared(mine(sum, k), 0.0f);
  }
  // To element j of piece `item`.
  MMFAST_DEVICE void add(int sum, int item, int j, float x) const {
    float* to = mine(sum, item * VEC + j);
    store_shared(to, load_shared(to) + x);
  }
  // After a barrier: the sum of column `c` of the tile over all teams, in their order.
  MMFAST_DEVICE float total(int sum, int32_t c) const {
    const int32_t vector = c / VEC, item = vector / lanes_, lane = vector - item * lanes_;
    const float* from = memory_ + (int64_t(sum) * HELD + item * VEC + c % VEC) * threads_;
    float all = 0;
    for (int32_t thread = lane; thread < threads_; thread += lanes_)
      all += load_shared(from + thread);
    return all;
  }

 private:
  MMFAST_DEVICE float* mine(int sum, int k) const {
    return memory_ + (int64_t(sum) * HELD + k) * threads_ + threadIdx.x;
  }
  int32_t lanes_, threads_;
  float* memory_;
};

}  // namespace mmfast
