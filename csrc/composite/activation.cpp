// Activations and their gradients in ATen's own operators.
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>

#include "../linear_act.h"

namespace mylayers {

at::Tensor activation_formula(const at::Tensor& z, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return z;
    case Activation::kRelu:
      return at::relu(z);
    case Activation::kTanh:
      return at::tanh(z);
    case Activation::kSigmoid:
      return at::sigmoid(z);
    case Activation::kElu:
      return at::elu(z);
    case Activation::kGelu:
      return at::gelu(z);
    case Activation::kGeluTanh:
      return at::gelu(z, "tanh");
  }
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor activation_backward_formula(
    const at::Tensor& grad_output, const at::Tensor& saved, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return grad_output;
    case Activation::kRelu:
      return at::threshold_backward(grad_output, saved, 0);
    case Activation::kTanh:
      return at::tanh_backward(grad_output, saved);
    case Activation::kSigmoid:
      return at::sigmoid_backward(grad_output, saved);
    case Activation::kElu:
      return at::elu_backward(
          grad_output, /*alpha=*/1, /*scale=*/1, /*input_scale=*/1, /*is_result=*/true, saved);
    case Activation::kGelu:
      return at::gelu_backward(grad_output, saved);
    case Activation::kGeluTanh:
      return at::gelu_backward(grad_output, saved, "tanh");
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace mylayers
