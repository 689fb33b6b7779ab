// sequential on the CPU: runs of linear layers by layers.h, other steps one by one.
#include "../sequential.h"

#include <torch/library.h>

#include <algorithm>

#include "activation.h"
#include "layers.h"
#include "linear_layer.h"

namespace mylayers {
namespace cpu {
namespace {

// linear_act's own checks and messages, for a layer whose input may never be a tensor.
void check_layer(
    const at::Tensor& x, int64_t in_units, const LinearStep& step, at::TensorList parameters) {
  if (x.dim() >= 1 && are_parameters_of(step, x, in_units, parameters)) {
    return;
  }
  const at::Tensor& weight = parameters[0];
  c10::SmallVector<int64_t, 6> sizes(x.sizes().begin(), x.sizes().end());
  if (!sizes.empty()) {
    sizes.back() = in_units;
  }
  check_linear_act(
      empty_like_of(x, {}).expand(sizes),
      step.transposed && weight.dim() == 2 ? weight.t() : weight,
      step.has_bias ? OptionalTensor(parameters[1]) : std::nullopt);
  TORCH_INTERNAL_ASSERT(false, "linear_act accepts what sequential refused");
}

// Computes them, and sets the last one's value; with `keeps_all` those of all.
void run_linear_steps(
    c10::ArrayRef<LinearAndActivation> steps, const Program& program, at::TensorList parameters,
    bool keeps_all, Run& run) {
  const at::Tensor& input = run.value(steps.front().linear->inputs[0]);
  c10::SmallVector<c10::MaybeOwned<at::Tensor>, 8> biases;
  with_storage_type(input.scalar_type(), [&]<class T>(T) {
    c10::SmallVector<Layer<T>, 8> layers;
    int64_t in_units = input.dim() == 0 ? 0 : input.size(-1);
    c10::SmallVector<int64_t, 6> sizes(input.sizes().begin(), input.sizes().end());
    const auto allocate = [&](const Step& step) {
      at::Tensor made = empty_like_of(input, sizes);
      T* const values = mutable_data<T>(made);
      run.set(step, std::move(made));
      return values;
    };
    for (const auto& step : steps) {
      const LinearStep& linear = *step.linear;
      const auto own = program.parameters_of(linear, parameters);
      check_layer(input, in_units, linear, own);
      const T* bias = nullptr;
      if (linear.has_bias) {
        bias = data<T>(*biases.emplace_back(own[1].expect_contiguous()));
      }
      const LinearLayer<T> layer(linear, own[0], bias);
      sizes.back() = in_units = layer.units;
      layers.push_back(
          {layer, step.activation ? step.activation->activation : linear.activation,
           step.activation != nullptr, keeps_all && step.activation ? allocate(linear) : nullptr,
           keeps_all || &step == &steps.back() ? allocate(step.last()) : nullptr});
    }
    const Rows x(input);
    run_layers<T>(x.count, x.matrix<T>(), layers);
  });
}

constexpr StepFunctions kKernels = {
    activation, activation_backward, linear_act_gradients, layer_norm, layer_norm_backward};

// Sets the last step's value; with `keeps_all` those of all.
void run_steps(const Program& program, at::TensorList parameters, bool keeps_all, Run& run) {
  program.check_parameters(parameters);
  for (size_t i = 0; i < program.steps.size();) {
    const Step& step = *program.steps[i];
    const auto linear = linear_run_from(program, i);
    if (linear.empty()) {
      run.set(
          step,
          step.forward(run.inputs_of(step), program.parameters_of(step, parameters), kKernels));
      ++i;
    } else {
      run_linear_steps(linear, program, parameters, keeps_all, run);
      i = linear.back().last().value;  // the steps before it, and itself
    }
    if (!keeps_all) {
      run.release(step);
    }
  }
}

}  // namespace

at::Tensor sequential(const at::Tensor& input, at::TensorList parameters, const Program& program) {
  if (!has_kernel(input)) {
    return sequential_formula(input, parameters, program);
  }
  Run run(program, input);
  run_steps(program, parameters, /*keeps_all=*/false, run);
  return run.take_result();
}

std::vector<at::Tensor> sequential_outputs(
    const at::Tensor& input, at::TensorList parameters, const Program& program) {
  if (!has_kernel(input)) {
    return sequential_outputs_formula(input, parameters, program);
  }
  Run run(program, input);
  run_steps(program, parameters, /*keeps_all=*/true, run);
  return run.outputs();
}

std::vector<at::Tensor> sequential_backward(
    at::TensorList grad_outputs, const at::Tensor& input, at::TensorList outputs,
    at::TensorList parameters, c10::SymIntArrayRef flattened, const Program& program,
    const GradientsAskedFor& asked) {
  const bool compiled = std::all_of(grad_outputs.begin(), grad_outputs.end(), [](const auto& t) {
    return !t.defined() || has_kernel(t);
  });
  return sequential_backward_by(
      compiled ? kKernels : kFormulas, grad_outputs, input, outputs, parameters, flattened, program,
      asked);
}

TORCH_LIBRARY_IMPL(mylayers, CPU, m) {
  m.impl("sequential", forward_kernel<sequential>);
  m.impl("sequential_outputs", forward_kernel<sequential_outputs>);
  m.impl("sequential_backward", backward_kernel<sequential_backward>);
}

}  // namespace cpu
}  // namespace mylayers
