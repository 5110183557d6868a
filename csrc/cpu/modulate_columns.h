// modulate, backward, the second pass: from the sums that tasks left to the gradients of weight,
// bias, and of the scale, shift and gate that rows share. The order of every sum follows from the
// shape alone.
#pragma once
#include "modulate_fwd.h"

namespace {

template <class S>
struct ModulateColumns {
  using Acc = typename S::Acc;
  const ModulateArgs& a;

  // Over the tasks of one group.
  template <class At>
  MMFAST_MEMBER Vec<Acc> over_chunks(const void* sums, int64_t group, int64_t c, At at) const {
    const Acc* p = static_cast<const Acc*>(sums) + group * a.chunks * a.sum_stride + c;
    return sum_of_slots(p, a.chunks, a.sum_stride, at);
  }
  template <class At>
  MMFAST_MEMBER Vec<Acc> side(const RowOperand& x, int64_t group, int64_t c, At at) const {
    Vec<Acc> v = {};
    WithStore<Acc>::call(x.dtype, [&](auto tag) MMFAST_LAMBDA {
      v = at.template load<decltype(tag)>(
          row_at<const typename decltype(tag)::Bits>(x, group, 0, c));
    });
    return v;
  }
  template <class At>
  MMFAST_MEMBER void put(const RowOperand& x, int64_t group, int64_t c, At at, Vec<Acc> v) const {
    WithStore<Acc>::call(x.dtype, [&](auto tag) MMFAST_LAMBDA {
      at.template store<decltype(tag)>(row_at<typename decltype(tag)::Bits>(x, group, 0, c), v);
    });
  }
  // One item's gradient is stored; what items share is summed on.
  template <class At>
  MMFAST_MEMBER void give(const RowOperand& x, int64_t group, int64_t c, At at, Vec<Acc> v,
                          Compensated<Acc>& shared) const {
    if (x.s0 != 0)
      put(x, group, c, at, v);
    else
      shared.add(v);
  }

  template <class At>
  MMFAST_MEMBER void vector(int64_t c, At at) const {
    const Vec<Acc> one = splat(Acc(1));
    const Vec<Acc> weight = a.weight.data != nullptr ? side(a.weight, 0, c, at) : one;
    const Vec<Acc> bias = a.bias.data != nullptr ? side(a.bias, 0, c, at) : Vec<Acc>{};
    const bool scale = a.dscale.data != nullptr && !a.scale_by_row;
    const bool shift = a.dshift.data != nullptr && !a.shift_by_row;
    const bool gate = a.dgate.data != nullptr && !a.gate_by_row;
    Compensated<Acc> dweight, dbias, dscale, dshift, dgate;
    for (int64_t g = 0; g < a.groups; ++g) {
      Vec<Acc> d_n = {}, d = {};
      if (a.sum_d != nullptr)
        d_n = over_chunks(a.sum_d_n, g, c, at), d = over_chunks(a.sum_d, g, c, at);
      if (scale) give(a.dscale, g, c, at, weight * d_n + bias * d, dscale);
      if (shift) {
        const Vec<Acc> dout = a.sum_dout != nullptr ? over_chunks(a.sum_dout, g, c, at) : d;
        give(a.dshift, g, c, at, dout, dshift);
      }
      if (gate) give(a.dgate, g, c, at, over_chunks(a.sum_gate, g, c, at), dgate);
      const bool scaled = a.scale.data != nullptr && !a.scale_by_row;
      const Vec<Acc> s = scaled ? one + side(a.scale, g, c, at) : one;
      dweight.add(s * d_n);
      dbias.add(s * d);
    }
    if (scale && a.dscale.s0 == 0) put(a.dscale, 0, c, at, dscale.total());
    if (shift && a.dshift.s0 == 0) put(a.dshift, 0, c, at, dshift.total());
    if (gate && a.dgate.s0 == 0) put(a.dgate, 0, c, at, dgate.total());
    if (a.dweight.data != nullptr) put(a.dweight, 0, c, at, dweight.total());
    if (a.dbias.data != nullptr) put(a.dbias, 0, c, at, dbias.total());
  }
};

template <class S>
void modulate_bwd_columns(const ModulateArgs& a, int64_t task) {
  const int64_t from = task * mmfast::kModulateColumns;
  const int64_t count = min64(mmfast::kModulateColumns, a.shape.columns - from);
  const ModulateColumns<S> columns{a};
  each_vector<Plain<typename S::Acc>>(
      count, [&](auto at, int64_t i) MMFAST_LAMBDA { columns.vector(from + i, at); });
}

// out[i] = sum over s of parts[s * stride + i]
template <class Acc>
void modulate_sum_items(const void* parts, int64_t items, int64_t stride, int64_t count, void* out,
                        mmfast::DType dtype) {
  WithStore<Acc>::call(dtype, [&](auto tag) MMFAST_LAMBDA {
    using S = decltype(tag);
    sum_slots(static_cast<const Acc*>(parts), items, stride, count,
              [&](auto at, int64_t i, Vec<Acc> sum) MMFAST_LAMBDA {
                at.template store<S>(static_cast<typename S::Bits*>(out) + i, sum);
              });
  });
}

}  // namespace
