// mylayers::sequential: a program of layers (steps/program.h) as one operator; what every backend
// shares.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "export.h"
#include "linear_act.h"
#include "steps/program.h"

namespace mylayers {

// What sequential takes and gives, in each of its forms below.
using SequentialFunction =
    at::Tensor(const at::Tensor& input, at::TensorList parameters, const Program& program);
// The output of every step that is no view; the last is the program's.
using SequentialOutputsFunction = std::vector<at::Tensor>(
    const at::Tensor& input, at::TensorList parameters, const Program& program);
// The gradients asked for, in order, from those that arrive at the outputs (undefined: none).
// Tensors that are not read may be undefined.
using SequentialBackwardFunction = std::vector<at::Tensor>(
    at::TensorList grad_outputs, const at::Tensor& input, at::TensorList outputs,
    at::TensorList parameters, c10::SymIntArrayRef flattened, const Program& program,
    const GradientsAskedFor& asked);

// Through the dispatcher, or straight to where it would lead.
MYLAYERS_API SequentialFunction sequential;
MYLAYERS_API at::Tensor sequential_by(
    Shortcut shortcut, const at::Tensor& input, at::TensorList parameters, const Program& program);
SequentialBackwardFunction sequential_backward;

// Through the dispatcher.
SequentialFunction dispatch_sequential;
SequentialOutputsFunction dispatch_sequential_outputs;
SequentialBackwardFunction dispatch_sequential_backward;

// What the kernel computes, below Autograd, in a node of the graph.
std::vector<at::Tensor> record_sequential(
    const at::Tensor& input, at::TensorList parameters, const Program& program,
    SequentialOutputsFunction* kernel);

// The layers one by one, through the dispatcher: differentiable, right for every device, dtype,
// layout and transform.
SequentialFunction sequential_formula;
SequentialOutputsFunction sequential_outputs_formula;
SequentialBackwardFunction sequential_backward_formula;

// The compiled kernels; they check their arguments.
namespace cpu {
SequentialFunction sequential;
SequentialOutputsFunction sequential_outputs;
SequentialBackwardFunction sequential_backward;
}  // namespace cpu

// ---- as the dispatcher passes arguments --------------------------------------------------------

using OptionalTensorList = c10::List<OptionalTensor>;

using ForwardKernel = at::Tensor(const at::Tensor&, at::TensorList, std::string_view);
using OutputsKernel = std::vector<at::Tensor>(const at::Tensor&, at::TensorList, std::string_view);
using BackwardKernel = std::vector<at::Tensor>(
    const OptionalTensorList&, const OptionalTensor&, const OptionalTensorList&,
    const OptionalTensorList&, c10::SymIntArrayRef, std::string_view, const c10::List<bool>&);

// kernel(input, parameters, program), for a forward function above.
template <auto kernel>
auto forward_kernel(const at::Tensor& input, at::TensorList parameters, std::string_view program) {
  check_memory("sequential", "input", input);
  for (const at::Tensor& parameter : parameters) {
    check_memory("sequential", "parameters", parameter);
  }
  return kernel(input, parameters, *Program::of(program));
}

// Undefined tensors for none.
std::vector<at::Tensor> tensors(const OptionalTensorList& list);
OptionalTensorList optional_tensors(at::TensorList list);

// The same for a backward function.
template <auto kernel>
std::vector<at::Tensor> backward_kernel(
    const OptionalTensorList& grad_outputs, const OptionalTensor& input,
    const OptionalTensorList& outputs, const OptionalTensorList& parameters,
    c10::SymIntArrayRef flattened, std::string_view program, const c10::List<bool>& output_mask) {
  return kernel(
      tensors(grad_outputs), input.value_or(at::Tensor()), tensors(outputs), tensors(parameters),
      flattened, *Program::of(program), GradientsAskedFor(output_mask.begin(), output_mask.end()));
}

}  // namespace mylayers
