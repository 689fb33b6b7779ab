// relu, tanh, ...: an activation that stands alone.
#include "../linear_act.h"
#include "step.h"

namespace mylayers {

const StepFunctions kFormulas = {
    activation_formula, activation_backward_formula, linear_backward_formula, layer_norm_formula,
    layer_norm_backward_formula};

at::Tensor ActivationStep::forward(
    at::TensorList inputs, at::TensorList, const StepFunctions& functions) const {
  return functions.activation(inputs[0], activation);
}

ReadByBackward ActivationStep::read_by_backward(const GradientsOfStep&) const {
  const bool input = step_reads_input(activation);
  return {.inputs = {input}, .parameters = {}, .output = !input};
}

Tensors ActivationStep::backward(const BackwardArguments& given) const {
  const auto& functions = given.functions;
  const bool from_input = step_reads_input(activation);
  const at::Tensor saved = !from_input ? given.output
                           : reads_input(activation)
                               ? given.inputs[0]
                               : functions.activation(given.inputs[0], activation);
  return {functions.activation_backward(given.grad_output, saved, activation)};
}

std::unique_ptr<Step> parse_activation(const StepText& text) {
  const auto activation = activation_named(text.head);
  return activation.has_value() && text.suffixes.empty()
             ? std::make_unique<ActivationStep>(*activation)
             : nullptr;
}

}  // namespace mylayers
