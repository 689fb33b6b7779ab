// mylayers::linear_act: what every backend shares.
//
//   linear_act(X, W, b, act) = act(X @ W + b)
//   X (..., in_units) or (in_units), W (in_units, units), b (units) or none
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "activation.h"
#include "dispatch/questions.h"
#include "export.h"

namespace mylayers {

using OptionalTensor = std::optional<at::Tensor>;
using ActivationName = std::optional<std::string_view>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // input, weight, bias
using GradientMask = std::array<bool, 3>;

// What linear_act takes and gives, in each of its forms below.
using LinearActFunction = at::Tensor(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    Activation activation);
// Its backward: the gradients that the mask asks for, the others undefined. Only the weight's
// gradient reads input, only the input's reads weight, only an activation reads output: each may be
// none where it is not read.
using LinearActBackwardFunction = Gradients(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask);
// The same, the weight and its gradient (units, in_units) if `transposed`.
using LinearBackwardFunction = Gradients(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask, bool transposed);
// act(z), and dY * act' from what that is a function of, the output or z.
using ActivationFunction = at::Tensor(const at::Tensor& z, Activation activation);
using ActivationBackwardFunction =
    at::Tensor(const at::Tensor& grad_output, const at::Tensor& saved, Activation activation);

// An activation by its name, "elu" or "elu(0.5)"; ValueError for any other, or nothing.
MYLAYERS_API Activation parse_activation(ActivationName name);
std::optional<Activation> activation_named(std::string_view name);
std::optional<std::string> activation_name(Activation activation);
std::string activation_names();  // "relu, tanh, ..."

// RuntimeError if the tensor's memory has been taken away.
void check_memory(const char* op, const char* name, const at::Tensor& t);

// Shapes, dtypes, devices and memory of one call; RuntimeError (as torch.nn.functional.linear
// gives) naming operator, argument, expected and got.
void check_linear_act(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias);
void check_linear_act_backward(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask,
    bool transposed = false);

// Through the dispatcher, or straight to where it would lead.
MYLAYERS_API LinearActFunction linear_act;
MYLAYERS_API at::Tensor linear_act_by(
    Shortcut shortcut, const at::Tensor& input, const at::Tensor& weight,
    const OptionalTensor& bias, Activation activation);
LinearActBackwardFunction linear_act_backward;

// Through the dispatcher.
LinearActFunction dispatch_linear_act;
LinearActBackwardFunction dispatch_linear_act_backward;

// What the kernel computes, below Autograd, in a node of the graph.
at::Tensor record_linear_act(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    Activation activation, LinearActFunction* kernel);

// The ATen formulas: differentiable, right for every device, dtype, layout and transform.
LinearActFunction linear_act_formula;
LinearActBackwardFunction linear_act_backward_formula;
LinearBackwardFunction linear_backward_formula;
ActivationFunction activation_formula;
ActivationBackwardFunction activation_backward_formula;

// The compiled kernels; they check their arguments.
namespace cpu {
LinearActFunction linear_act;
LinearActBackwardFunction linear_act_backward;
LinearBackwardFunction linear_act_gradients;
}  // namespace cpu

// ---- as the dispatcher passes arguments --------------------------------------------------------

// kernel(input, weight, bias, activation), for a forward function above.
template <auto kernel>
at::Tensor linear_act_kernel(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    ActivationName activation) {
  return kernel(input, weight, bias, parse_activation(activation));
}

// The same for a backward function.
template <auto kernel>
Gradients linear_act_backward_kernel(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, ActivationName activation, GradientMask mask) {
  return kernel(grad_output, input, weight, output, parse_activation(activation), mask);
}

}  // namespace mylayers
