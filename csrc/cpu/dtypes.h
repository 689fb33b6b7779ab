// From PyTorch's dtypes to the kernels' storage types.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_native.h>
#include <ATen/ops/empty_strided_native.h>

#include "../dispatch/questions.h"
#include "huge_pages.h"
#include "kernels/kernels.h"

namespace mylayers::cpu {

// f(T{}) for the storage type of `dtype`, one of those that has_kernel names.
template <class F>
void with_storage_type(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kHalf:
      return f(half_t{});
    case at::kBFloat16:
      return f(bfloat16_t{});
    default:
      TORCH_INTERNAL_ASSERT(false, "no CPU kernel for ", dtype);
  }
}

template <class T>
const T* data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Not at::empty and at::empty_strided, which would go through the dispatcher again; like them,
// fill the memory with NaN under torch.use_deterministic_algorithms(True).
inline at::Tensor empty_like_of(const at::Tensor& t, at::IntArrayRef sizes) {
  at::Tensor fresh = at::native::empty_cpu(sizes, t.scalar_type());
  prefer_huge_pages(fresh.mutable_data_ptr(), fresh.nbytes());
  return fresh;
}
// Of t's own sizes and strides, for a t without overlap and gaps.
inline at::Tensor empty_like_of(const at::Tensor& t) {
  at::Tensor fresh = at::native::empty_strided_cpu(t.sizes(), t.strides(), t.scalar_type());
  prefer_huge_pages(fresh.mutable_data_ptr(), fresh.nbytes());
  return fresh;
}

}  // namespace mylayers::cpu
