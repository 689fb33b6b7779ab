// Layer normalisation, a step of programs.
//
//   layer_norm(X, W, b) = (X - mean) / sqrt(variance + epsilon) * W + b
//   mean and variance over the last dimensions of X, whose sizes are those of W and b; none: 1, 0
#pragma once

#include <c10/util/SmallVector.h>

#include "linear_act.h"

namespace mylayers {

struct LayerNorm {
  c10::SmallVector<int64_t, 2> sizes;
  double epsilon;
};

using LayerNormFunction = at::Tensor(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const LayerNorm& norm);
// The gradients that the mask asks for, the others undefined. The weight's has the weight's dtype,
// and so has the bias's, which has the weight's sizes.
using LayerNormBackwardFunction = Gradients(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const LayerNorm& norm, GradientMask mask);

// Every device and dtype, every derivative and every transform.
LayerNormFunction layer_norm_formula;
LayerNormBackwardFunction layer_norm_backward_formula;
// By ATen's kernels: what the formula is where nobody follows it.
LayerNormFunction layer_norm_by_aten;
LayerNormBackwardFunction layer_norm_backward_by_aten;

// The compiled kernels, for dense CPU tensors; all else they leave to ATen.
namespace cpu {
LayerNormFunction layer_norm;
LayerNormBackwardFunction layer_norm_backward;
}  // namespace cpu

}  // namespace mylayers
