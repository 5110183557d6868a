// What the 32 lanes of a warp do together. Each lane leaves its operands; the last one to come
// computes the results of all. Fragment layouts are those of the PTX ISA, "Warp-level matrix
// instructions": g = lane / 4 and q = lane % 4 below.
#include <string.h>

#include "../common/dtype.h"
#include "arrive.h"

namespace mmfast::host {
namespace {

typedef float Row8 __attribute__((vector_size(32)));
typedef uint32_t Bits8 __attribute__((vector_size(32)));

// Two 16-bit numbers in a register, eight registers at a time: the first in the lower half.
struct Pairs {
  Row8 first, second;
};

Row8 as_row(Bits8 bits) {
  Row8 row;
  memcpy(&row, &bits, sizeof(row));
  return row;
}

template <Kind kKind>
Pairs widen(const Bits8& registers) {
  if constexpr (kKind == Kind::kMmaBf16) {
    return {as_row(registers << 16), as_row(registers & 0xffff0000u)};
  } else {
    Pairs pairs;
    for (int i = 0; i < 8; ++i) {
      pairs.first[i] = f16_to_float(uint16_t(registers[i] & 0xffffu));
      pairs.second[i] = f16_to_float(uint16_t(registers[i] >> 16));
    }
    return pairs;
  }
}

// c[g][2 q, 2 q + 1] is c0, c1 of the lane, c[g + 8][...] c2, c3.
struct Accumulator {
  Row8 row[16];

  explicit Accumulator(const Warp& warp) {
    float* to = reinterpret_cast<float*>(row);
    for (int lane = 0; lane < kLanes; ++lane) {
      memcpy(to + 2 * lane, warp.operands[lane]->c, 8);
      memcpy(to + 64 + 2 * lane, warp.operands[lane]->c + 2, 8);
    }
  }

  void store(Warp& warp) const {
    const float* from = reinterpret_cast<const float*>(row);
    for (int lane = 0; lane < kLanes; ++lane) {
      memcpy(warp.operands[lane]->c, from + 2 * lane, 8);
      memcpy(warp.operands[lane]->c + 2, from + 64 + 2 * lane, 8);
    }
  }
};

// a0: a[g][2 q, 2 q + 1], a1: a[g + 8][same], a2: a[g][2 q + 8, 2 q + 9], a3: a[g + 8][same];
// b0: b[2 q, 2 q + 1][g], b1: b[2 q + 8, 2 q + 9][g].
template <Kind kKind>
void mma_16(Warp& warp) {
  alignas(32) uint32_t a[16][8];  // [row][k / 2]
  alignas(32) uint32_t b[8][8];   // [k / 2][column]
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, q = lane % 4;
    const MmaOperands& x = *warp.operands[lane];
    a[g][q] = x.a[0];
    a[g + 8][q] = x.a[1];
    a[g][q + 4] = x.a[2];
    a[g + 8][q + 4] = x.a[3];
    b[q][g] = x.b[0];
    b[q + 4][g] = x.b[1];
  }
  Pairs b_rows[8];
  for (int k = 0; k < 8; ++k) {
    Bits8 bits;
    memcpy(&bits, b[k], sizeof(bits));
    b_rows[k] = widen<kKind>(bits);
  }
  Accumulator c(warp);
  for (int row = 0; row < 16; ++row) {
    Bits8 bits;
    memcpy(&bits, a[row], sizeof(bits));
    const Pairs a_row = widen<kKind>(bits);
    alignas(32) float first[8], second[8];
    memcpy(first, &a_row.first, sizeof(first));
    memcpy(second, &a_row.second, sizeof(second));
    Row8 sum = c.row[row];
    for (int k = 0; k < 8; ++k) sum += first[k] * b_rows[k].first + second[k] * b_rows[k].second;
    c.row[row] = sum;
  }
  c.store(warp);
}

// a0: a[g][q], a1: a[g + 8][q], a2: a[g][q + 4], a3: a[g + 8][q + 4]; b0: b[q][g], b1: b[q + 4][g].
// The lower 13 bits are not there for the tensor core.
void mma_tf32(Warp& warp) {
  float a[16][8];
  Row8 b[8];
  const auto truncated = [](uint32_t bits) { return bits_to_float(bits & 0xffffe000u); };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, q = lane % 4;
    const MmaOperands& x = *warp.operands[lane];
    a[g][q] = truncated(x.a[0]);
    a[g + 8][q] = truncated(x.a[1]);
    a[g][q + 4] = truncated(x.a[2]);
    a[g + 8][q + 4] = truncated(x.a[3]);
    b[q][g] = truncated(x.b[0]);
    b[q + 4][g] = truncated(x.b[1]);
  }
  Accumulator c(warp);
  for (int row = 0; row < 16; ++row) {
    Row8 sum = c.row[row];
    for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k];
    c.row[row] = sum;
  }
  c.store(warp);
}

// Matrix i has the rows that lanes 8 i to 8 i + 7 point to. Lane gets of each matrix the 32 bits
// [g][2 q, 2 q + 1], or [2 q][g] and [2 q + 1][g] of the transposed form.
void load_matrices(Warp& warp, int matrices, bool transposed) {
  uint16_t x[4][8][8];
  memcpy(x, warp.row, size_t(matrices) * 128);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < matrices; ++i) {
      warp.registers[lane][i] = transposed
                                    ? uint32_t(x[i][2 * q][g]) | uint32_t(x[i][2 * q + 1][g]) << 16
                                    : uint32_t(x[i][g][2 * q]) | uint32_t(x[i][g][2 * q + 1]) << 16;
    }
  }
}

}  // namespace

uint32_t shuffle(uint32_t value, int lane, Site site) {
  Thread& self = current();
  Warp& warp = block.warps[self.warp];
  warp.value[self.lane] = value;
  warp.source[self.lane] = lane & (kLanes - 1);
  if (arrive(warp, self, Kind::kShuffle, site)) {
    for (int i = 0; i < kLanes; ++i) warp.result[i] = warp.value[warp.source[i]];
    leave(warp);
  }
  return warp.result[self.lane];
}

uint32_t ballot(bool predicate, Site site) {
  Thread& self = current();
  Warp& warp = block.warps[self.warp];
  warp.value[self.lane] = predicate;
  if (arrive(warp, self, Kind::kBallot, site)) {
    uint32_t votes = 0;
    for (int i = 0; i < kLanes; ++i) votes |= warp.value[i] << i;
    for (int i = 0; i < kLanes; ++i) warp.result[i] = votes;
    leave(warp);
  }
  return warp.result[self.lane];
}

void ldmatrix(uint32_t* r, int matrices, bool transposed, Row row, const void* address, Site site) {
  Thread& self = current();
  Warp& warp = block.warps[self.warp];
  warp.row[self.lane] = row;
  warp.address[self.lane] = address;
  warp.registers[self.lane] = r;
  const Kind kind = matrices == 4 ? (transposed ? Kind::kLdmatrixX4Trans : Kind::kLdmatrixX4)
                                  : (transposed ? Kind::kLdmatrixX2Trans : Kind::kLdmatrixX2);
  if (arrive(warp, self, kind, site)) {
    load_matrices(warp, matrices, transposed);
    leave(warp);
  }
}

void mma(Kind kind, const MmaOperands& operands, Site site) {
  Thread& self = current();
  Warp& warp = block.warps[self.warp];
  warp.operands[self.lane] = &operands;
  if (!arrive(warp, self, kind, site)) return;
  if (kind == Kind::kMmaBf16) {
    mma_16<Kind::kMmaBf16>(warp);
  } else if (kind == Kind::kMmaF16) {
    mma_16<Kind::kMmaF16>(warp);
  } else {
    mma_tf32(warp);
  }
  leave(warp);
}

}  // namespace mmfast::host
