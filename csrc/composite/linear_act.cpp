// linear_act in ATen's own operators: every device, dtype, layout and transform that has
// no compiled kernel; and the shapes of its results, for the Meta device.
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "../linear_act.h"

namespace mylayers {
namespace {

c10::SymDimVector output_sizes(const at::Tensor& input, const at::Tensor& weight) {
  c10::SymDimVector sizes(input.sym_sizes());
  sizes.back() = weight.sym_size(1);
  return sizes;
}

// (rows, last size): -1 would be ambiguous for a last size of 0.
at::Tensor as_matrix(const at::Tensor& t) {
  c10::SymInt rows = 1;
  for (const auto& size : t.sym_sizes().slice(0, t.dim() - 1)) {
    rows = rows * size;
  }
  return t.reshape_symint({rows, t.sym_size(-1)});
}

at::Tensor linear_act_meta(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    Activation activation) {
  check_linear_act(input, weight, bias);
  return at::empty_symint(output_sizes(input, weight), input.options());
}

Gradients linear_act_backward_meta(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask) {
  check_linear_act_backward(grad_output, input, weight, output, activation, mask);
  const auto fresh = [&](c10::SymIntArrayRef sizes) {
    return at::empty_symint(sizes, grad_output.options());
  };
  const c10::SymInt units = grad_output.sym_size(-1);
  Gradients gradients;
  if (mask[0]) {
    c10::SymDimVector sizes(grad_output.sym_sizes());
    sizes.back() = weight->sym_size(0);
    std::get<0>(gradients) = fresh(sizes);
  }
  if (mask[1]) {
    std::get<1>(gradients) = fresh({input->sym_size(-1), units});
  }
  if (mask[2]) {
    std::get<2>(gradients) = fresh({units});
  }
  return gradients;
}

}  // namespace

at::Tensor linear_act_formula(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    Activation activation) {
  // A nested tensor has no sizes to check; ATen checks its parts.
  if (!input.is_nested() && !weight.is_nested()) {
    check_linear_act(input, weight, bias);
  }
  auto y = at::matmul(input, weight);
  if (bias.has_value() && bias->defined()) {
    y = y + *bias;
  }
  return activation_formula(y, activation);
}

Gradients linear_act_backward_formula(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask) {
  check_linear_act_backward(grad_output, input, weight, output, activation, mask);
  const auto dz = activation == Activation::kNone
                      ? grad_output
                      : activation_backward_formula(grad_output, *output, activation);
  Gradients gradients;
  if (mask[0]) {
    std::get<0>(gradients) = at::matmul(dz, weight->t().conj());
  }
  if (mask[1]) {
    std::get<1>(gradients) = at::matmul(as_matrix(*input).t().conj(), as_matrix(dz));
  }
  if (mask[2]) {
    std::get<2>(gradients) = as_matrix(dz).sum(0);
  }
  return gradients;
}

TORCH_LIBRARY_IMPL(mylayers, CompositeExplicitAutograd, m) {
  m.impl("linear_act", linear_act_kernel<linear_act_formula>);
  m.impl("linear_act_backward", linear_act_backward_kernel<linear_act_backward_formula>);
}

// Not among the backends of the key above.
TORCH_LIBRARY_IMPL(mylayers, NestedTensorCPU, m) {
  m.impl("linear_act", linear_act_kernel<linear_act_formula>);
}
TORCH_LIBRARY_IMPL(mylayers, NestedTensorCUDA, m) {
  m.impl("linear_act", linear_act_kernel<linear_act_formula>);
}

TORCH_LIBRARY_IMPL(mylayers, FuncTorchBatched, m) {
  m.impl("linear_act", linear_act_kernel<linear_act_formula>);
  m.impl("linear_act_backward", linear_act_backward_kernel<linear_act_backward_formula>);
}

TORCH_LIBRARY_IMPL(mylayers, Meta, m) {
  m.impl("linear_act", linear_act_kernel<linear_act_meta>);
  m.impl("linear_act_backward", linear_act_backward_kernel<linear_act_backward_meta>);
}

}  // namespace mylayers
