// Sums whose order does not matter to the last digits.
#pragma once
#include "device.cuh"

namespace mmfast {

// A sum as if in twice the precision: what each addition rounds off is kept beside it.
struct CompensatedSum {
  float sum = 0, lost = 0;
  MMFAST_DEVICE void add(float x) {
    const float next = sum + x, back = next - sum;
    lost += (sum - (next - back)) + (x - back);
    sum = next;
  }
  MMFAST_DEVICE float total() const {
    return lost == lost ? sum + lost : sum;  // inf - inf is no lost part
  }
};

}  // namespace mmfast
