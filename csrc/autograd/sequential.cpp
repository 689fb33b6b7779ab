// The gradient of sequential, one node for the whole chain, and its rule under autocast.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "../dispatch/questions.h"
#include "../sequential.h"

namespace mylayers {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Every output is one of the node's, though only the last leaves the chain: the gradients of a
// gradient come back through those that backward has read. The last is the node's first, for that
// is where hooks on a grad_fn look for the gradient.
void last_first(variable_list& tensors) {
  std::rotate(tensors.begin(), tensors.end() - 1, tensors.end());
}
void first_last(variable_list& tensors) {
  std::rotate(tensors.begin(), tensors.begin() + 1, tensors.end());
}

struct Sequential : torch::autograd::Function<Sequential> {
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward

  static variable_list forward(
      AutogradContext* ctx, const at::Tensor& input, const at::TensorList& parameters,
      const Program& program, SequentialOutputsFunction* kernel) {
    ctx->set_materialize_grads(false);
    variable_list outputs;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      outputs = kernel(input, parameters, program);
    }
    GradientsAskedFor asked = {input.requires_grad()};
    for (const at::Tensor& parameter : parameters) {
      asked.push_back(parameter.requires_grad());
    }
    // Input, outputs, parameters; undefined where backward does not look.
    const SavedForBackward reads(program, asked);
    variable_list saved = {reads.input ? input : at::Tensor()};
    for (size_t i = 0; i < outputs.size(); ++i) {
      saved.push_back(reads.outputs[i] ? outputs[i] : at::Tensor());
    }
    for (size_t i = 0; i < parameters.size(); ++i) {
      saved.push_back(reads.parameters[i] ? parameters[i] : at::Tensor());
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["program"] = program.text;
    if (auto flattened = flattened_sizes(input, outputs, program); !flattened.empty()) {
      ctx->saved_data["flattened"] = std::move(flattened);
    }
    last_first(outputs);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    first_last(grads);
    const auto kept = Program::of(ctx->saved_data["program"].toStringView());
    const Program& program = *kept;
    const size_t tensors = 1 + program.parameters;
    variable_list gradients(tensors + 2);  // the program and the kernel were arguments, too
    // What no gradient reaches gets none, not zeros.
    const GradientsAskedFor reached = reached_from(grads, program);
    if (std::find(reached.begin(), reached.end(), true) == reached.end()) {
      return gradients;
    }
    const auto saved = ctx->get_saved_variables();
    const at::TensorList all = saved;
    GradientsAskedFor asked;
    for (size_t i = 0; i < tensors; ++i) {
      asked.push_back(reached[i] && ctx->needs_input_grad(i));
    }
    const auto flattened = ctx->saved_data.find("flattened");
    auto wanted = sequential_backward(
        grads, all[0], all.slice(1, program.outputs), all.slice(1 + program.outputs),
        flattened == ctx->saved_data.end() ? std::vector<c10::SymInt>()
                                           : flattened->second.toSymIntVector(),
        program, asked);
    for (size_t i = 0, next = 0; i < tensors; ++i) {
      if (asked[i]) {
        gradients[i] = std::move(wanted[next++]);
      }
    }
    return gradients;
  }
};

std::vector<at::Tensor> sequential_outputs_autograd(
    const at::Tensor& input, at::TensorList parameters, const Program& program) {
  const auto args = arguments(input, {parameters});
  if (takes_formula(args)) {
    return sequential_outputs_formula(input, parameters, program);
  }
  if (records_gradient(args)) {
    return record_sequential(input, parameters, program, dispatch_sequential_outputs);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return dispatch_sequential_outputs(input, parameters, program);
}

at::Tensor sequential_autograd(
    const at::Tensor& input, at::TensorList parameters, const Program& program) {
  const auto args = arguments(input, {parameters});
  if (takes_formula(args)) {
    return sequential_formula(input, parameters, program);
  }
  if (records_gradient(args)) {
    return record_sequential(input, parameters, program, dispatch_sequential_outputs).back();
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return dispatch_sequential(input, parameters, program);
}

// Double backward: as soon as a gradient of the gradient is to be recorded, the formula.
std::vector<at::Tensor> sequential_backward_autograd(
    at::TensorList grad_outputs, const at::Tensor& input, at::TensorList outputs,
    at::TensorList parameters, c10::SymIntArrayRef flattened, const Program& program,
    const GradientsAskedFor& asked) {
  const auto args = arguments(input, {grad_outputs, outputs, parameters});
  if (takes_formula(args) || records_gradient(args)) {
    return sequential_backward_formula(
        grad_outputs, input, outputs, parameters, flattened, program, asked);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return dispatch_sequential_backward(
      grad_outputs, input, outputs, parameters, flattened, program, asked);
}

// Under autocast a line of layers that begins with a linear one computes in the autocast dtype from
// there on, as they would one by one; in another program the layers decide.
template <c10::DeviceType kDevice>
at::Tensor sequential_autocast(
    const at::Tensor& input, at::TensorList parameters, const Program& program) {
  if (!program.steps[0]->as_linear() || !program.is_line || !program.casts_as_one) {
    return sequential_formula(input, parameters, program);
  }
  const c10::impl::ExcludeDispatchKeyGuard once(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)));
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  return sequential(
      at::autocast::cached_cast(dtype, input, kDevice),
      at::autocast::cached_cast(dtype, parameters, kDevice), program);
}

TORCH_LIBRARY_IMPL(mylayers, Autograd, m) {
  m.impl("sequential", forward_kernel<sequential_autograd>);
  m.impl("sequential_outputs", forward_kernel<sequential_outputs_autograd>);
  m.impl("sequential_backward", backward_kernel<sequential_backward_autograd>);
}
TORCH_LIBRARY_IMPL(mylayers, AutocastCPU, m) {
  m.impl("sequential", forward_kernel<sequential_autocast<c10::DeviceType::CPU>>);
}
TORCH_LIBRARY_IMPL(mylayers, AutocastCUDA, m) {
  m.impl("sequential", forward_kernel<sequential_autocast<c10::DeviceType::CUDA>>);
}
TORCH_LIBRARY_IMPL(mylayers, AutocastXPU, m) {
  m.impl("sequential", forward_kernel<sequential_autocast<c10::DeviceType::XPU>>);
}
TORCH_LIBRARY_IMPL(mylayers, AutocastMPS, m) {
  m.impl("sequential", forward_kernel<sequential_autocast<c10::DeviceType::MPS>>);
}

}  // namespace

std::vector<at::Tensor> record_sequential(
    const at::Tensor& input, at::TensorList parameters, const Program& program,
    SequentialOutputsFunction* kernel) {
  program.check_parameters(parameters);
  auto outputs = Sequential::apply(input, parameters, program, kernel);
  first_last(outputs);
  return outputs;
}

}  // namespace mylayers
