// The gradient of linear_act, and its rule under autocast.
//
//   dZ = dY * act'(Y),   dX = dZ W^T,   dW = X^T dZ,   db = sum of dZ over rows
//
// act' is a function of Y, so nothing is kept that the next layer does not keep anyway.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../dispatch/questions.h"
#include "../linear_act.h"
#include "../sequential.h"

namespace mylayers {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LinearAct : torch::autograd::Function<LinearAct> {
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
      const OptionalTensor& bias, Activation activation, LinearActFunction* kernel) {
    ctx->set_materialize_grads(false);
    at::Tensor output;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      output = kernel(input, weight, bias, activation);
    }
    // Each factor of the product is read by the other's gradient alone.
    ctx->save_for_backward(
        {weight.requires_grad() ? input : at::Tensor(),
         input.requires_grad() ? weight : at::Tensor(),
         activation == Activation::kNone ? at::Tensor() : output});
    ctx->saved_data["activation"] = static_cast<int64_t>(activation.kind);
    if (row_of(activation).has_setting()) {
      ctx->saved_data["setting"] = activation.setting;
    }
    ctx->saved_data["has_bias"] = bias.has_value();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) {  // no gradient arrived: none goes on, not zeros
      return variable_list(5);
    }
    const auto saved = ctx->get_saved_variables();
    const auto optional = [&](size_t i) {
      return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt;
    };
    // Without a bias the node has no third edge to ask about.
    const GradientMask mask = {
        ctx->needs_input_grad(0), ctx->needs_input_grad(1),
        ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)};
    Activation activation(static_cast<ActivationKind>(ctx->saved_data["activation"].toInt()));
    if (row_of(activation).has_setting()) {
      activation.setting = ctx->saved_data["setting"].toDouble();
    }
    auto [input, weight, bias] =
        linear_act_backward(grads[0], optional(0), optional(1), optional(2), activation, mask);
    return {input, weight, bias, at::Tensor(), at::Tensor()};
  }
};

at::Tensor linear_act_autograd(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    Activation activation) {
  const at::Tensor none;
  const std::initializer_list<const at::Tensor*> args = {
      &input, &weight, bias.has_value() ? &*bias : &none};
  if (takes_formula(args)) {
    return linear_act_formula(input, weight, bias, activation);
  }
  if (records_gradient(args)) {
    return record_linear_act(input, weight, bias, activation, dispatch_linear_act);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return dispatch_linear_act(input, weight, bias, activation);
}

// Double backward: as soon as a gradient of the gradient is to be recorded, the formula.
Gradients linear_act_backward_autograd(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask) {
  const at::Tensor none;
  const std::initializer_list<const at::Tensor*> args = {
      &grad_output, input.has_value() ? &*input : &none, weight.has_value() ? &*weight : &none,
      output.has_value() ? &*output : &none};
  if (takes_formula(args) || records_gradient(args)) {
    return linear_act_backward_formula(grad_output, input, weight, output, activation, mask);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return dispatch_linear_act_backward(grad_output, input, weight, output, activation, mask);
}

// Under autocast the whole layer computes in the autocast dtype, as F.linear does.
template <c10::DeviceType kDevice>
at::Tensor linear_act_autocast(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    Activation activation) {
  const c10::impl::ExcludeDispatchKeyGuard once(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)));
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  return linear_act(
      at::autocast::cached_cast(dtype, input, kDevice),
      at::autocast::cached_cast(dtype, weight, kDevice),
      at::autocast::cached_cast(dtype, bias, kDevice), activation);
}

TORCH_LIBRARY_IMPL(mylayers, Autograd, m) {
  m.impl("linear_act", linear_act_kernel<linear_act_autograd>);
  m.impl("linear_act_backward", linear_act_backward_kernel<linear_act_backward_autograd>);
}
TORCH_LIBRARY_IMPL(mylayers, AutocastCPU, m) {
  m.impl("linear_act", linear_act_kernel<linear_act_autocast<c10::DeviceType::CPU>>);
}
TORCH_LIBRARY_IMPL(mylayers, AutocastCUDA, m) {
  m.impl("linear_act", linear_act_kernel<linear_act_autocast<c10::DeviceType::CUDA>>);
}
TORCH_LIBRARY_IMPL(mylayers, AutocastXPU, m) {
  m.impl("linear_act", linear_act_kernel<linear_act_autocast<c10::DeviceType::XPU>>);
}
TORCH_LIBRARY_IMPL(mylayers, AutocastMPS, m) {
  m.impl("linear_act", linear_act_kernel<linear_act_autocast<c10::DeviceType::MPS>>);
}

}  // namespace

at::Tensor record_linear_act(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    Activation activation, LinearActFunction* kernel) {
  const bool has_bias = bias.has_value() && bias->defined();
  if (reads_input(activation)) {
    const auto is_subclass = [](const at::Tensor& t) {
      return t.key_set().has(c10::DispatchKey::Python);
    };
    if (is_subclass(input) || is_subclass(weight) || (has_bias && is_subclass(*bias))) {
      // Operators that a subclass knows: DTensor has rules for these, none for programs.
      return activation_formula(linear_act(input, weight, bias, Activation::kNone), activation);
    }
    // Two steps, the first of which keeps what the second one's backward reads.
    const auto program =
        Program::of((has_bias ? "linear+bias; " : "linear; ") + *activation_name(activation));
    return has_bias ? sequential(input, {weight, *bias}, *program)
                    : sequential(input, weight, *program);
  }
  return LinearAct::apply(input, weight, has_bias ? bias : OptionalTensor(), activation, kernel);
}

}  // namespace mylayers
