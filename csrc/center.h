// mylayers::center: what every backend shares.
//
//   center(X) = X - mean(X), the mean taken over `dim` (all dimensions if none)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/OptionalArrayRef.h>

#include "export.h"

namespace mylayers {

// The dimensions of the mean, wrapped to 0..rank-1, sorted; all of them for none or an
// empty list, as torch.mean reads it. IndexError out of range, RuntimeError for a repeat.
c10::SmallVector<int64_t, 6> center_dims(const at::Tensor& input, at::OptionalIntArrayRef dim);

// Through the dispatcher, or straight to the CPU kernel where that comes to the same.
MYLAYERS_API at::Tensor center(const at::Tensor& input, at::OptionalIntArrayRef dim);

// The ATen formula.
at::Tensor center_formula(const at::Tensor& input, at::OptionalIntArrayRef dim);

// The compiled kernel; it checks its arguments.
namespace cpu {
at::Tensor center(const at::Tensor& input, at::OptionalIntArrayRef dim);
}

}  // namespace mylayers
