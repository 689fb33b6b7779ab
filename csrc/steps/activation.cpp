// relu, tanh, ...: an activation that stands alone.
#include "../linear_act.h"
#include "step.h"

namespace mylayers {

const StepFunctions kFormulas = {
    activation_formula, activation_backward_formula, linear_backward_formula};

at::Tensor ActivationStep::forward(
    at::TensorList inputs, at::TensorList, const StepFunctions& functions) const {
  return functions.activation(inputs[0], activation);
}

ReadByBackward ActivationStep::read_by_backward(const GradientsOfStep&) const {
  return {
      .inputs = {reads_input(activation)}, .parameters = {}, .output = !reads_input(activation)};
}

Tensors ActivationStep::backward(const BackwardArguments& given) const {
  return {given.functions.activation_backward(
      given.grad_output, reads_input(activation) ? given.inputs[0] : given.output, activation)};
}

std::unique_ptr<Step> parse_activation(const StepText& text) {
  const auto activation = activation_named(text.name);
  return activation.has_value() && text.is_bare() ? std::make_unique<ActivationStep>(*activation)
                                                  : nullptr;
}

}  // namespace mylayers
