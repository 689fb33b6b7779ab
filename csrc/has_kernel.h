// Which tensors the compiled kernels take; all others take the ATen formula.
#pragma once

#include <ATen/core/Tensor.h>

namespace mylayers {

// Whether its memory has all of its elements. Who shards a model takes the memory of parameters
// away while they are not in use (untyped_storage().resize_(0)), and leaves them their sizes.
inline bool has_memory(const at::Tensor& t) {
  const at::TensorImpl& impl = *t.unsafeGetTensorImpl();
  if (!impl.has_storage() || impl.layout() != at::kStrided || t.is_nested() ||
      impl.has_symbolic_sizes_strides()) {
    return true;
  }
  const auto bytes = impl.unsafe_storage().sym_nbytes().maybe_as_int();
  if (!bytes.has_value()) {
    return true;
  }
  const at::IntArrayRef sizes = impl.sizes(), strides = impl.strides();
  int64_t last = impl.storage_offset();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) {
      return true;
    }
    last += (sizes[d] - 1) * strides[d];
  }
  return (last + 1) * static_cast<int64_t>(impl.itemsize()) <= *bytes;
}

inline bool has_kernel(const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  return t.layout() == at::kStrided && !t.is_nested() &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
          dtype == at::kBFloat16) &&
         has_memory(t);
}

}  // namespace mylayers
