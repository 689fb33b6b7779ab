// A linear layer of a chain, on pointers.
#pragma once

#include "../steps/step.h"
#include "matrices.h"

namespace mylayers::cpu {

template <class T>
struct LinearLayer {
  int64_t in_units, units;
  Matrix<T> weight;  // (in_units, units)
  const T* bias;     // contiguous; null: none

  LinearLayer(const LinearStep& step, const at::Tensor& given, const T* own_bias)
      : in_units(given.size(step.transposed ? 1 : 0)),
        units(given.size(step.transposed ? 0 : 1)),
        weight(step.transposed ? matrix<T>(given).transposed() : matrix<T>(given)),
        bias(own_bias) {}
};

// Whether the step's parameters are those of a layer that reads `in_units` columns of tensors like
// x. linear_act refuses others.
inline bool are_parameters_of(
    const LinearStep& step, const at::Tensor& x, int64_t in_units, at::TensorList parameters) {
  const auto alike = [&](const at::Tensor& t, int64_t dims) {
    return t.device() == x.device() && t.scalar_type() == x.scalar_type() && t.dim() == dims;
  };
  const at::Tensor& weight = parameters[0];
  return alike(weight, 2) && weight.size(step.transposed ? 1 : 0) == in_units &&
         (!step.has_bias || (alike(parameters[1], 1) &&
                             parameters[1].size(0) == weight.size(step.transposed ? 0 : 1)));
}

}  // namespace mylayers::cpu
