// Activations and their gradients in ATen's own operators.
#include <ATen/ops/abs.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>
#include <ATen/TensorOperators.h>

#include "../linear_act.h"

namespace mylayers {
namespace {

// at::elu's arguments alpha, scale and input_scale, of an activation that is one.
struct Elu {
  double alpha, scale = 1, input_scale = 1;
};
Elu elu_of(Activation activation) {
  if (activation == Activation::kSelu) {
    return {.alpha = kSeluAlpha, .scale = kSeluScale};
  }
  return {
      .alpha = activation.setting,
      .input_scale = activation == Activation::kCelu ? 1 / activation.setting : 1};
}

}  // namespace

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
    case Activation::kSelu:
    case Activation::kCelu: {
      const auto [alpha, scale, input_scale] = elu_of(activation);
      return at::elu(z, alpha, scale, input_scale);
    }
    case Activation::kGelu:
      return at::gelu(z);
    case Activation::kGeluTanh:
      return at::gelu(z, "tanh");
    case Activation::kSilu:
      return at::silu(z);
    case Activation::kLeakyRelu:
      return at::leaky_relu(z, activation.setting);
    case Activation::kSoftplus:
      return at::softplus(z);
    case Activation::kLogsigmoid:
      return at::log_sigmoid(z);
    case Activation::kMish:
      return at::mish(z);
    case Activation::kHardtanh:
      return at::hardtanh(z);
    case Activation::kRelu6:
      return at::hardtanh(z, 0, 6);
    case Activation::kHardswish:
      return at::hardswish(z);
    case Activation::kHardsigmoid:
      return at::hardsigmoid(z);
    case Activation::kSoftsign:
      return z / (z.abs() + 1);
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
    case Activation::kSelu:
    case Activation::kCelu: {
      const auto [alpha, scale, input_scale] = elu_of(activation);
      return at::elu_backward(grad_output, alpha, scale, input_scale, /*is_result=*/true, saved);
    }
    case Activation::kGelu:
      return at::gelu_backward(grad_output, saved);
    case Activation::kGeluTanh:
      return at::gelu_backward(grad_output, saved, "tanh");
    case Activation::kSilu: {  // ATen's silu_backward and mish_backward have no derivatives
      const auto s = saved.sigmoid();
      return grad_output * (s * (1 + saved * (1 - s)));
    }
    case Activation::kLeakyRelu:  // of its output, which has its input's sign
      return at::leaky_relu_backward(
          grad_output, saved, activation.setting, /*self_is_result=*/true);
    case Activation::kSoftplus:  // sigmoid(z) = 1 - e^-y
      return grad_output * at::where(saved > 20, 1, -at::expm1(-saved));
    case Activation::kLogsigmoid:  // sigmoid(-z) = 1 - e^y
      return -grad_output * at::expm1(saved);
    case Activation::kMish: {
      const auto t = at::tanh(at::softplus(saved));
      return grad_output * (t + saved * saved.sigmoid() * (1 - t * t));
    }
    case Activation::kHardtanh:
      return at::hardtanh_backward(grad_output, saved, -1, 1);
    case Activation::kRelu6:
      return at::hardtanh_backward(grad_output, saved, 0, 6);
    case Activation::kHardswish:
      return at::hardswish_backward(grad_output, saved);
    case Activation::kHardsigmoid:
      // ATen's hardsigmoid_backward has no derivative either, and a factor of float32.
      return at::where((saved > -3).logical_and(saved < 3), grad_output / 6, 0);
    case Activation::kSoftsign: {
      const auto denominator = saved.abs() + 1;
      return grad_output / (denominator * denominator);
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace mylayers
