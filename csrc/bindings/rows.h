// Tensors of the row-wise ops: [B, N, C] -> RowOperand, the memory of results, and as few and as
// long rows as the strides allow.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "../cpu/isa.h"
#include "../cpu/rows.h"
#include "tensor.h"

namespace mmfast {

inline void require_rows(bool condition, const char* op, const char* what) {
  if (!condition) throw std::runtime_error(std::string("mmfast::") + op + ": " + what);
}

inline RowShape row_shape(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes[0], sizes[1], sizes[2]};
}

// Data [B, N, C] whose last dim has stride 1 (or size 1).
inline RowOperand row_data(const Tensor& x) {
  const auto strides = x.strides();
  return {x.data_ptr(), strides[0], strides[1], 1, dtype_of(x)};
}

// What broadcasts, [B|1, N|1, C|1]: stride 0 where the size is 1. Its last stride must be 1 where
// its last size is not.
inline RowOperand row_side(const Tensor& x) {
  return {x.data_ptr(), stride_or_zero(x, 0), stride_or_zero(x, 1), stride_or_zero(x, 2),
          dtype_of(x)};
}
// One bool a row, [B|1, N|1].
inline RowOperand row_flags(const Tensor& x) {
  RowOperand r = {x.data_ptr(), stride_or_zero(x, 0), stride_or_zero(x, 1), 0, DType::F32};
  r.per_row = true;
  return r;
}
// Whether `x` is [B|1, N|1, C|1] (rank 3) or [B|1, N|1] (rank 2) for this shape.
inline bool broadcasts_to(const Tensor& x, const RowShape& shape, int64_t rank) {
  if (x.dim() != rank) return false;
  const auto s = x.sizes();
  return (s[0] == 1 || s[0] == shape.n0) && (s[1] == 1 || s[1] == shape.n1) &&
         (rank == 2 || s[2] == 1 || s[2] == shape.columns);
}

// A result [B, N, C] for `like`: [N, B, C] in memory where `like` is, otherwise contiguous.
inline Tensor empty_rows(const Tensor& like, const std::array<int64_t, 3>& sizes, DType dtype,
                         const Place& at = kOnCpu) {
  const auto strides = like.strides();
  const auto least = [](int64_t x) { return x > 0 ? x : 1; };
  const int64_t B = least(sizes[0]), N = least(sizes[1]), C = least(sizes[2]);
  const bool rows_first = B > 1 && N > 1 && strides[0] < strides[1];
  return rows_first ? empty_strided_at<3>(at, sizes, {C, B * C, 1}, dtype)
                    : empty_strided_at<3>(at, sizes, {N * C, C, 1}, dtype);
}
inline Tensor empty_rows_like(const Tensor& like, const Place& at = kOnCpu) {
  const auto s = like.sizes();
  return empty_rows(like, {s[0], s[1], s[2]}, dtype_of(like), at);
}
// A vector [C] beside data of this storage: a weight or bias; absent, an operand without data.
inline RowOperand row_vector(const OptionalTensor& t, const RowShape& shape, DType storage,
                             const char* op) {
  if (!t.has_value()) return {};
  const DType dtype = dtype_of(*t);
  require_rows(dtype == storage || (storage != DType::F64 && dtype == DType::F32), op,
               "weight and bias must have the dtype of the data or float32");
  require_rows(t->dim() == 1 && t->sizes()[0] == shape.columns &&
                   (shape.columns <= 1 || t->strides()[0] == 1),
               op, "weight and bias must be dense [C]");
  return {t->data_ptr(), 0, 0, 1, dtype};
}

inline Tensor empty_nothing(DType dtype, const Place& at = kOnCpu) {
  return empty_at<1>(at, {0}, dtype);
}

// The gradient of such a vector, and its operand; nothing where it is not needed.
inline Tensor row_vector_gradient(const OptionalTensor& t, bool needed, DType storage,
                                  RowOperand& operand, const Place& at = kOnCpu) {
  if (!needed || !t.has_value()) return empty_nothing(storage, at);
  Tensor result = empty_at<1>(at, {t->sizes()[0]}, dtype_of(*t));
  operand = {result.data_ptr(), 0, 0, 1, dtype_of(*t)};
  return result;
}

// Rows of a task of an op that takes whole rows, out of groups of `group_rows`: enough to be worth
// its beginning (side tensors, sums that start at 0), few enough for many threads. From the shape
// alone.
inline int64_t whole_rows_each(const RowShape& shape, int64_t group_rows, int64_t pieces) {
  const int64_t wanted = std::clamp<int64_t>(shape.rows() / pieces, 8, 64);
  return std::min(std::max(wanted, 8192 / shape.columns), group_rows);
}

// Whether `tensors` of this shape together do not fit the last-level cache: results then go past
// the caches, because nobody would find them there.
inline bool past_caches(const RowShape& shape, DType dtype, int64_t tensors) {
  return shape.elements() * tensors * dtype_bytes(dtype) > last_level_cache_bytes();
}

// The operands of one op, for rewriting the shape: elementwise ops do not care which dim is which.
// Operands with null data are skipped.
class RowOperands {
 public:
  RowOperands(RowShape& shape, std::initializer_list<RowOperand*> operands) : shape_(shape) {
    for (RowOperand* x : operands) add(*x);
  }
  // At most kMost operands; they live as long as this object.
  void add(RowOperand& x) {
    if (x.data != nullptr) all_[count_++] = &x;
  }

  // [N, B, C] in memory becomes the order of the dims.
  void order_by_memory(const RowOperand& first) {
    if (shape_.n0 > 1 && shape_.n1 > 1 && first.s0 < first.s1) swap_rows();
  }
  void swap_rows() {
    std::swap(shape_.n0, shape_.n1);
    each([](RowOperand& x) { std::swap(x.s0, x.s1); });
  }
  // [n0, n1] -> [1, n0 * n1] where every operand allows it.
  bool merge_rows() {
    if (shape_.n0 == 1) return true;
    if (shape_.n1 == 1) {
      std::swap(shape_.n0, shape_.n1);
      each([](RowOperand& x) { x.s1 = x.s0, x.s0 = 0; });
      return true;
    }
    for (int i = 0; i < count_; ++i)
      if (all_[i]->s0 != all_[i]->s1 * shape_.n1) return false;
    shape_.n1 *= shape_.n0;
    shape_.n0 = 1;
    each([](RowOperand& x) { x.s0 = 0; });
    return true;
  }
  // [n1, columns] -> [1, n1 * columns] where every operand allows it. Not for ops that mean
  // something by a row.
  bool merge_columns() {
    if (shape_.n1 == 1) return true;
    for (int i = 0; i < count_; ++i) {
      const RowOperand& x = *all_[i];
      const bool broadcast_may_widen = shape_.columns == 1 && x.sc == 0 && !x.per_row && x.s1 == 1;
      if (x.s1 != x.sc * shape_.columns && !broadcast_may_widen) return false;
    }
    if (shape_.columns == 1) each([](RowOperand& x) { x.sc = x.s1; });
    shape_.columns *= shape_.n1;
    shape_.n1 = 1;
    each([](RowOperand& x) { x.s1 = 0; });
    return true;
  }
  void fewest_rows(const RowOperand& first) {
    order_by_memory(first);
    merge_rows();
    if (merge_columns()) merge_rows();
  }

 private:
  template <class F>
  void each(const F& f) {
    for (int i = 0; i < count_; ++i) f(*all_[i]);
  }
  RowShape& shape_;
  static constexpr int kMost = 144;  // features and gradients of 64 modalities, and more
  RowOperand* all_[kMost];
  int count_ = 0;
};

}  // namespace mmfast
