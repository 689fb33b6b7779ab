// The gradients of a program: which are asked for, what they read, and the way back.
#include <ATen/TensorOperators.h>
#include <c10/util/irange.h>

#include "program.h"

namespace mylayers {
namespace {

// Of each value: whether a gradient that is asked for lies before it.
std::vector<bool> values_with_gradients(const Program& program, const GradientsAskedFor& asked) {
  std::vector<bool> has(program.values.size());
  has[0] = asked[0];
  for (const auto& step : program.steps) {
    bool here = false;
    for (const size_t input : step->inputs) {
      here = here || has[input];
    }
    for (const auto p : c10::irange(step->parameters())) {
      here = here || asked[1 + step->first_parameter + p];
    }
    has[step->value] = here;
  }
  return has;
}

GradientsOfStep asked_of(
    const Step& step, const std::vector<bool>& has_gradient, const GradientsAskedFor& asked) {
  GradientsOfStep of;
  for (const size_t input : step.inputs) {
    of.inputs.push_back(has_gradient[input]);
  }
  for (const auto p : c10::irange(step.parameters())) {
    of.parameters.push_back(asked[1 + step.first_parameter + p]);
  }
  return of;
}

void add_to(at::Tensor& sum, const at::Tensor& more) {
  if (more.defined()) {
    sum = sum.defined() ? sum + more : more;
  }
}

// The sizes in front of `flattened`, which is left with those behind them.
c10::SymIntArrayRef next_sizes(
    c10::SymIntArrayRef& flattened, const Program& program, size_t number) {
  const bool given = !flattened.empty() && flattened[0] >= 0 && flattened[0] < flattened.size();
  TORCH_CHECK_VALUE(
      given, "sequential_backward: flattened must hold, for each flatten of \"", program.text,
      "\", the number of dimensions and then their sizes; got too few for flatten ", number);
  const size_t rank = flattened[0].expect_int();
  const auto sizes = flattened.slice(1, rank);
  flattened = flattened.slice(1 + rank);
  return sizes;
}

}  // namespace

SavedForBackward::SavedForBackward(const Program& program, const GradientsAskedFor& asked)
    : outputs(program.outputs), parameters(program.parameters) {
  TORCH_CHECK_VALUE(
      asked.size() == 1 + program.parameters, "sequential_backward: output_mask must have ",
      1 + program.parameters, " entries, for the input and each parameter of \"", program.text,
      "\"; got ", asked.size());
  const auto has_gradient = values_with_gradients(program, asked);
  for (const auto& step : program.steps) {
    if (!has_gradient[step->value]) {
      continue;
    }
    const auto reads = step->read_by_backward(asked_of(*step, has_gradient, asked));
    for (const auto i : c10::irange(step->inputs.size())) {
      if (!reads.inputs[i]) {
        continue;
      }
      const size_t source = program.values[step->inputs[i]].source;
      if (source == 0) {
        input = true;
      } else {
        outputs[program.steps[source - 1]->output] = true;
      }
    }
    for (const auto p : c10::irange(step->parameters())) {
      parameters[step->first_parameter + p] = reads.parameters[p];
    }
    if (reads.output) {
      outputs[step->output] = true;
    }
  }
}

GradientsAskedFor reached_from(at::TensorList grad_outputs, const Program& program) {
  GradientsAskedFor reached(1 + program.parameters);
  std::vector<bool> values(program.values.size());
  for (size_t i = program.steps.size(); i-- > 0;) {
    const Step& step = *program.steps[i];
    if (!values[step.value] && (step.is_view() || !grad_outputs[step.output].defined())) {
      continue;
    }
    for (const size_t input : step.inputs) {
      values[input] = true;
    }
    for (const auto p : c10::irange(step.parameters())) {
      reached[1 + step.first_parameter + p] = true;
    }
  }
  reached[0] = values[0];
  return reached;
}

std::vector<c10::SymInt> flattened_sizes(
    const at::Tensor& input, at::TensorList outputs, const Program& program) {
  std::vector<c10::SymInt> flattened;
  if (program.outputs == program.steps.size()) {
    return flattened;
  }
  Run run(program, input);
  for (const auto& step : program.steps) {
    if (!step->is_view()) {
      run.set(*step, outputs[step->output]);
      continue;
    }
    const at::Tensor& x = run.value(step->inputs[0]);
    flattened.push_back(x.dim());
    flattened.insert(flattened.end(), x.sym_sizes().begin(), x.sym_sizes().end());
    run.set(*step, step->forward(x, {}, kFormulas));
  }
  return flattened;
}

std::vector<at::Tensor> sequential_backward_by(
    const StepFunctions& functions, at::TensorList grad_outputs, const at::Tensor& input,
    at::TensorList outputs, at::TensorList parameters, c10::SymIntArrayRef flattened,
    const Program& program, const GradientsAskedFor& asked) {
  program.check_parameters(parameters);
  for (const auto& [name, list] :
       {std::pair("grad_outputs", grad_outputs), std::pair("outputs", outputs)}) {
    TORCH_CHECK_VALUE(
        list.size() == program.outputs, "sequential_backward: ", name, " must hold ",
        program.outputs, " tensors or None for \"", program.text, "\"; got ", list.size());
  }
  const SavedForBackward saved(program, asked);
  const auto require = [&](const at::Tensor& t, bool read, const char* name, size_t i) {
    TORCH_CHECK_VALUE(
        !read || t.defined(), "sequential_backward: ", name, " ", i,
        " must be a tensor for the gradients asked for of \"", program.text, "\"; got None");
  };
  require(input, saved.input, "input", 0);
  for (const auto i : c10::irange(outputs.size())) {
    require(outputs[i], saved.outputs[i], "output", i);
  }
  for (const auto i : c10::irange(parameters.size())) {
    require(parameters[i], saved.parameters[i], "parameter", i);
  }

  Run run(program, input);  // undefined where nothing reads it
  std::vector<c10::SymIntArrayRef> sizes;
  for (const auto& step : program.steps) {
    if (!step->is_view()) {
      run.set(*step, outputs[step->output]);
      continue;
    }
    const at::Tensor& x = run.value(step->inputs[0]);
    run.set(*step, x.defined() ? step->forward(x, {}, kFormulas) : at::Tensor());
    sizes.push_back(next_sizes(flattened, program, sizes.size()));
  }
  TORCH_CHECK_VALUE(
      flattened.empty(), "sequential_backward: flattened must hold the sizes of ", sizes.size(),
      " flattened tensors for \"", program.text, "\"; got ", flattened.size(), " numbers more");

  const auto has_gradient = values_with_gradients(program, asked);
  std::vector<at::Tensor> of_values(program.values.size()), gradients(asked.size());
  for (size_t i = program.steps.size(); i-- > 0;) {
    const Step& step = *program.steps[i];
    at::Tensor grad = std::move(of_values[step.value]);
    c10::SymIntArrayRef viewed_sizes;
    if (step.is_view()) {
      viewed_sizes = sizes.back();
      sizes.pop_back();
    } else {
      add_to(grad, grad_outputs[step.output]);
    }
    if (!grad.defined() || !has_gradient[step.value]) {
      continue;
    }
    const auto of_step = asked_of(step, has_gradient, asked);
    const auto inputs = run.inputs_of(step);
    const auto found = step.backward(
        {grad, inputs, program.parameters_of(step, parameters),
         step.is_view() ? at::Tensor() : outputs[step.output], viewed_sizes, of_step, functions});
    for (const auto k : c10::irange(step.inputs.size())) {
      if (of_step.inputs[k]) {
        add_to(of_values[step.inputs[k]], found[k]);
      }
    }
    for (const auto p : c10::irange(step.parameters())) {
      gradients[1 + step.first_parameter + p] = found[step.arity() + p];
    }
  }
  gradients[0] = of_values[0];
  std::vector<at::Tensor> wanted;
  for (const auto i : c10::irange(asked.size())) {
    if (asked[i]) {
      TORCH_CHECK_VALUE(
          gradients[i].defined(), "sequential_backward: output_mask asks for gradient ", i,
          " of \"", program.text, "\", which no grad_outputs reach");
      wanted.push_back(std::move(gradients[i]));
    }
  }
  return wanted;
}

}  // namespace mylayers
