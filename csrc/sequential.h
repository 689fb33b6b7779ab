// mylayers::sequential: a chain of layers as one operator; what every backend shares.
//
// A program names the steps of the chain, separated by "; ":
//
//   linear[+bias][+ACT]     act(X @ W + b), W (in_units, units)
//   linear_t[+bias][+ACT]   the same with W (units, in_units), as nn.Linear keeps it
//   ACT                     relu, tanh, sigmoid or elu alone
//   center, center(d,...)   X - mean of X over dimensions d, or over all
//   flatten(first,last)     X with these dimensions as one; never the last step
//
// `parameters` holds each linear step's weight and then, if it has one, its bias.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/OptionalArrayRef.h>

#include <memory>
#include <string>
#include <vector>

#include "export.h"
#include "linear_act.h"

namespace mylayers {

struct Step {
  enum class Kind { kLinear, kActivation, kCenter, kFlatten };
  Kind kind;
  Activation activation = Activation::kNone;
  bool transposed = false, has_bias = false;
  c10::SmallVector<int64_t, 2> dims = {};  // of center (none: all) and flatten

  at::OptionalIntArrayRef center_dim() const {
    return dims.empty() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(dims);
  }
  // A flatten has no result of its own: it is a view of what came before it.
  bool computes() const { return kind != Kind::kFlatten; }
  size_t parameters() const { return kind == Kind::kLinear ? 1 + has_bias : 0; }
};

struct MYLAYERS_API Program {
  explicit Program(std::string_view text);  // ValueError for what the grammar lacks

  // The same, parsed once: a thread keeps those that it was last asked for.
  static std::shared_ptr<const Program> of(std::string_view text);

  void check_parameters(at::TensorList given) const;

  std::string text;
  std::vector<Step> steps;
  size_t outputs = 0, parameters = 0;  // of computing steps, and in all
};

// Gradients asked for: the input's, then each parameter's.
using GradientsAskedFor = c10::SmallVector<bool, 16>;

// What the backward that gives these gradients reads: what the single layers would keep.
struct Reads {
  Reads(const Program& program, const GradientsAskedFor& asked);

  bool input = false;
  std::vector<bool> outputs, parameters;
};

// What every flatten flattens, as the backward wants it: its dimensions' number, then their sizes.
// Kept in place of the tensors, which would be held for nothing else.
std::vector<c10::SymInt> flattened_sizes(
    const at::Tensor& input, at::TensorList outputs, const Program& program);

// Through the dispatcher, or straight to the CPU kernel where that comes to the same.
MYLAYERS_API at::Tensor sequential(
    const at::Tensor& input, at::TensorList parameters, const Program& program);
// The output of every computing step; the last is the chain's.
std::vector<at::Tensor> sequential_outputs(
    const at::Tensor& input, at::TensorList parameters, const Program& program);
// The gradients asked for, in order, from those that arrive at the outputs (undefined: none).
// Tensors that are not read may be undefined.
std::vector<at::Tensor> sequential_backward(
    at::TensorList grad_outputs, const at::Tensor& input, at::TensorList outputs,
    at::TensorList parameters, c10::SymIntArrayRef flattened, const Program& program,
    const GradientsAskedFor& asked);

// The layers one by one, through the dispatcher: differentiable, right for every device, dtype,
// layout and transform.
at::Tensor sequential_formula(
    const at::Tensor& input, at::TensorList parameters, const Program& program);
std::vector<at::Tensor> sequential_outputs_formula(
    const at::Tensor& input, at::TensorList parameters, const Program& program);
std::vector<at::Tensor> sequential_backward_formula(
    at::TensorList grad_outputs, const at::Tensor& input, at::TensorList outputs,
    at::TensorList parameters, c10::SymIntArrayRef flattened, const Program& program,
    const GradientsAskedFor& asked);

// The backward, given that of a linear step: as linear_act_backward, the weight and its gradient
// in the step's layout.
using LinearBackward = Gradients(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask, bool transposed);
LinearBackward linear_backward_formula;
std::vector<at::Tensor> sequential_backward_by(
    LinearBackward* linear_backward, at::TensorList grad_outputs, const at::Tensor& input,
    at::TensorList outputs, at::TensorList parameters, c10::SymIntArrayRef flattened,
    const Program& program, const GradientsAskedFor& asked);

// The compiled kernels; they check their arguments.
namespace cpu {
at::Tensor sequential(const at::Tensor& input, at::TensorList parameters, const Program& program);
std::vector<at::Tensor> sequential_outputs(
    const at::Tensor& input, at::TensorList parameters, const Program& program);
std::vector<at::Tensor> sequential_backward(
    at::TensorList grad_outputs, const at::Tensor& input, at::TensorList outputs,
    at::TensorList parameters, c10::SymIntArrayRef flattened, const Program& program,
    const GradientsAskedFor& asked);
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
