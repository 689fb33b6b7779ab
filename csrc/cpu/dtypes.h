// From PyTorch's dtypes to the kernels' storage types.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_native.h>

#include "kernels.h"

namespace mylayers::cpu {

// f(T{}) for the storage type of `dtype`; false if the kernels do not have it.
template <class F>
bool with_storage_type(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat:
      f(float{});
      return true;
    case at::kDouble:
      f(double{});
      return true;
    case at::kHalf:
      f(half_t{});
      return true;
    case at::kBFloat16:
      f(bfloat16_t{});
      return true;
    default:
      return false;
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

// Not at::empty, which would go through the dispatcher again; like it, fills the memory
// with NaN under torch.use_deterministic_algorithms(True).
inline at::Tensor empty_like_of(const at::Tensor& t, at::IntArrayRef sizes) {
  return at::native::empty_cpu(sizes, t.scalar_type());
}

}  // namespace mylayers::cpu
