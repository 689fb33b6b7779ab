// linear, linear_t: a linear layer with the activation behind it.
#include "../linear_act.h"
#include "step.h"

namespace mylayers {
namespace {

OptionalTensor optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

}  // namespace

at::Tensor LinearStep::forward(
    at::TensorList inputs, at::TensorList parameters, const StepFunctions&) const {
  return linear_act(
      inputs[0], transposed ? parameters[0].t() : parameters[0],
      has_bias ? OptionalTensor(parameters[1]) : std::nullopt, activation);
}

// Each factor of the product is read by the other's gradient alone.
ReadByBackward LinearStep::read_by_backward(const GradientsOfStep& asked) const {
  return {
      .inputs = {asked.parameters[0]},
      .parameters = {asked.inputs[0], false},
      .output = activation != Activation::kNone};
}

Tensors LinearStep::backward(const BackwardArguments& given) const {
  const GradientMask mask = {
      given.asked.inputs[0], given.asked.parameters[0], has_bias && given.asked.parameters[1]};
  auto [input, weight, bias] = given.functions.linear_backward(
      given.grad_output, optional(given.inputs[0]), optional(given.parameters[0]),
      optional(given.output), activation, mask, transposed);
  return {std::move(input), std::move(weight), std::move(bias)};
}

Gradients linear_backward_formula(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask, bool transposed) {
  auto gradients = linear_act_backward(
      grad_output, input, transposed && weight.has_value() ? weight->t() : weight, output,
      activation, mask);
  auto& weight_gradient = std::get<1>(gradients);
  if (transposed && weight_gradient.defined()) {
    weight_gradient = weight_gradient.t().contiguous();
  }
  return gradients;
}

std::unique_ptr<Step> parse_linear(const StepText& text) {
  if ((text.name != "linear" && text.name != "linear_t") || text.has_arguments()) {
    return nullptr;
  }
  auto step = std::make_unique<LinearStep>();
  step->transposed = text.name == "linear_t";
  auto suffix = text.suffixes.begin();
  if (suffix != text.suffixes.end() && *suffix == "bias") {
    step->has_bias = true;
    ++suffix;
  }
  if (suffix != text.suffixes.end()) {
    const auto activation = activation_named(*suffix++);
    if (!activation.has_value() || reads_input(*activation)) {
      return nullptr;
    }
    step->activation = *activation;
  }
  return suffix == text.suffixes.end() ? std::move(step) : nullptr;
}

}  // namespace mylayers
