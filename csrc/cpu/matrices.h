// Tensors as the matrices that gemm.h takes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>

#include "dtypes.h"
#include "gemm.h"

namespace mylayers::cpu {

// (..., cols) seen as (rows, cols): the tensor's memory where strides allow, else a copy. Borrowed
// tensors, here and below, save counting references, which for one that Python knows takes the GIL.
struct Rows {
  c10::MaybeOwned<at::Tensor> owner;
  int64_t count, cols;
  int64_t row, col;  // strides

  explicit Rows(at::Tensor&&) = delete;
  explicit Rows(const at::Tensor& t)
      : owner(c10::MaybeOwned<at::Tensor>::borrowed(t)),
        count(1),
        cols(t.size(-1)),
        row(0),
        col(1) {
    for (int64_t d = 0; d + 1 < t.dim(); ++d) {
      count *= t.size(d);
    }
    if (t.dim() == 2) {
      row = t.stride(0);
      col = t.stride(1);
      return;
    }
    if (t.dim() > 2) {
      owner = c10::MaybeOwned<at::Tensor>::owned(t.reshape({count, cols}));
      row = owner->stride(0);
    }
    col = owner->stride(-1);
  }

  template <class T>
  Matrix<T> matrix() const {
    return {data<T>(*owner), row, col};
  }
};

template <class T>
Matrix<T> matrix(const at::Tensor& t) {
  return {data<T>(t), t.stride(0), t.stride(1)};
}

}  // namespace mylayers::cpu
