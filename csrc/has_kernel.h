// Which tensors the compiled kernels take; all others take the ATen formula.
#pragma once

#include <ATen/core/Tensor.h>

namespace mylayers {

inline bool has_kernel(const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  return t.layout() == at::kStrided && !t.is_nested() &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
          dtype == at::kBFloat16);
}

}  // namespace mylayers
