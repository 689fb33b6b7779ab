// sequential as its layers one by one. Each is a call through the dispatcher, which finds that
// layer's kernel, shape rule or formula for whatever device, mode or transform this runs under.
#include "../sequential.h"

#include <ATen/ops/flatten.h>
#include <ATen/TensorOperators.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>

#include "../center.h"

namespace mylayers {

std::vector<at::Tensor> sequential_outputs_formula(
    const at::Tensor& input, at::TensorList parameters, const Program& program) {
  program.check_parameters(parameters);
  std::vector<at::Tensor> outputs;
  at::Tensor x = input;
  const at::Tensor* parameter = parameters.data();
  for (const Step& step : program.steps) {
    switch (step.kind) {
      case Step::Kind::kLinear:
        x = linear_act(
            x, step.transposed ? parameter[0].t() : parameter[0],
            step.has_bias ? OptionalTensor(parameter[1]) : std::nullopt,
            activation_name(step.activation));
        parameter += step.parameters();
        break;
      case Step::Kind::kActivation:
        x = activation_formula(x, step.activation);
        break;
      case Step::Kind::kCenter:
        x = center(x, step.center_dim());
        break;
      case Step::Kind::kFlatten:
        x = at::flatten(x, step.dims[0], step.dims[1]);
        break;
    }
    if (step.computes()) {
      outputs.push_back(x);
    }
  }
  return outputs;
}

std::vector<c10::SymInt> flattened_sizes(
    const at::Tensor& input, at::TensorList outputs, const Program& program) {
  std::vector<c10::SymInt> flattened;
  at::Tensor x = input;
  for (const Step& step : program.steps) {
    if (step.computes()) {
      x = outputs.front();
      outputs = outputs.slice(1);
    } else {
      flattened.push_back(x.dim());
      flattened.insert(flattened.end(), x.sym_sizes().begin(), x.sym_sizes().end());
      x = at::flatten(x, step.dims[0], step.dims[1]);
    }
  }
  return flattened;
}

at::Tensor sequential_formula(
    const at::Tensor& input, at::TensorList parameters, const Program& program) {
  return sequential_outputs_formula(input, parameters, program).back();
}

Gradients linear_backward_formula(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask, bool transposed) {
  auto gradients = linear_act_backward(
      grad_output, input, transposed && weight.has_value() ? weight->t() : weight, output,
      activation_name(activation), mask);
  auto& weight_gradient = std::get<1>(gradients);
  if (transposed && weight_gradient.defined()) {
    weight_gradient = weight_gradient.t().contiguous();
  }
  return gradients;
}

std::vector<at::Tensor> sequential_backward_by(
    LinearBackward* linear_backward, at::TensorList grad_outputs, const at::Tensor& input,
    at::TensorList outputs, at::TensorList parameters, c10::SymIntArrayRef flattened,
    const Program& program, const GradientsAskedFor& asked) {
  program.check_parameters(parameters);
  for (const auto& [name, list] :
       {std::pair("grad_outputs", grad_outputs), std::pair("outputs", outputs)}) {
    TORCH_CHECK_VALUE(
        list.size() == program.outputs, "sequential_backward: ", name, " must hold ",
        program.outputs, " tensors or None for \"", program.text, "\"; got ", list.size());
  }
  const Reads reads(program, asked);
  const auto require = [&](const at::Tensor& t, bool read, const char* name, size_t i) {
    TORCH_CHECK_VALUE(
        !read || t.defined(), "sequential_backward: ", name, " ", i,
        " must be a tensor for the gradients asked for of \"", program.text, "\"; got None");
  };
  require(input, reads.input, "input", 0);
  for (const auto i : c10::irange(outputs.size())) {
    require(outputs[i], reads.outputs[i], "output", i);
  }
  for (const auto i : c10::irange(parameters.size())) {
    require(parameters[i], reads.parameters[i], "parameter", i);
  }

  std::vector<at::Tensor> inputs;          // of every step; undefined where nothing reads it
  std::vector<c10::SymIntArrayRef> sizes;  // of what each flatten flattens
  at::Tensor x = input;
  size_t output = 0;
  for (const Step& step : program.steps) {
    inputs.push_back(x);
    if (step.computes()) {
      x = outputs[output++];
      continue;
    }
    if (x.defined()) {
      x = at::flatten(x, step.dims[0], step.dims[1]);
    }
    const bool given = !flattened.empty() && flattened[0] >= 0 && flattened[0] < flattened.size();
    TORCH_CHECK_VALUE(
        given, "sequential_backward: flattened must hold, for each flatten of \"", program.text,
        "\", the number of dimensions and then their sizes; got too few for flatten ",
        sizes.size());
    const size_t rank = flattened[0].expect_int();
    sizes.push_back(flattened.slice(1, rank));
    flattened = flattened.slice(1 + rank);
  }
  TORCH_CHECK_VALUE(
      flattened.empty(), "sequential_backward: flattened must hold the sizes of ", sizes.size(),
      " flattened tensors for \"", program.text, "\"; got ", flattened.size(), " numbers more");

  const auto optional = [](const at::Tensor& t) {
    return t.defined() ? OptionalTensor(t) : std::nullopt;
  };
  std::vector<at::Tensor> gradients(asked.size());
  at::Tensor grad;
  size_t parameter = program.parameters;
  for (size_t i = program.steps.size(); i-- > 0;) {
    const Step& step = program.steps[i];
    parameter -= step.parameters();
    if (step.computes()) {
      const at::Tensor& arrives = grad_outputs[--output];
      grad = !grad.defined() ? arrives : arrives.defined() ? grad + arrives : grad;
    }
    if (!grad.defined()) {
      continue;  // the gradients begin at an earlier output
    }
    const bool before = std::find(asked.begin(), asked.begin() + 1 + parameter, true) !=
                        asked.begin() + 1 + parameter;
    switch (step.kind) {
      case Step::Kind::kLinear: {
        const GradientMask mask = {
            before, asked[1 + parameter], step.has_bias && asked[2 + parameter]};
        auto [dx, dw, db] = linear_backward(
            grad, optional(inputs[i]), optional(parameters[parameter]), optional(outputs[output]),
            step.activation, mask, step.transposed);
        grad = dx;
        gradients[1 + parameter] = dw;
        if (step.has_bias) {
          gradients[2 + parameter] = db;
        }
        break;
      }
      case Step::Kind::kActivation:
        grad = before ? activation_backward_formula(grad, outputs[output], step.activation)
                      : at::Tensor();
        break;
      case Step::Kind::kCenter:
        grad = before ? center(grad, step.center_dim()) : at::Tensor();
        break;
      case Step::Kind::kFlatten:
        if (before) {
          const c10::SymIntArrayRef as_before = sizes.back();
          TORCH_SYM_CHECK(
              c10::multiply_integers(as_before).sym_eq(grad.sym_numel()),
              "sequential_backward: flattened must have the elements of a gradient of ",
              grad.sym_sizes(), "; got sizes ", as_before);
          grad = grad.reshape_symint(as_before);
        }
        sizes.pop_back();
        break;
    }
    if (!before) {
      break;
    }
  }
  gradients[0] = grad;
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

std::vector<at::Tensor> sequential_backward_formula(
    at::TensorList grad_outputs, const at::Tensor& input, at::TensorList outputs,
    at::TensorList parameters, c10::SymIntArrayRef flattened, const Program& program,
    const GradientsAskedFor& asked) {
  return sequential_backward_by(
      linear_backward_formula, grad_outputs, input, outputs, parameters, flattened, program, asked);
}

// Meta as well: each layer has its own shape rule.
TORCH_LIBRARY_IMPL(mylayers, CompositeExplicitAutograd, m) {
  m.impl("sequential", forward_kernel<sequential_formula>);
  m.impl("sequential_outputs", forward_kernel<sequential_outputs_formula>);
  m.impl("sequential_backward", backward_kernel<sequential_backward_formula>);
}
// Not among the backends of the key above.
TORCH_LIBRARY_IMPL(mylayers, NestedTensorCPU, m) {
  m.impl("sequential", forward_kernel<sequential_formula>);
}
TORCH_LIBRARY_IMPL(mylayers, NestedTensorCUDA, m) {
  m.impl("sequential", forward_kernel<sequential_formula>);
}
// The older vmap, of torch.autograd.grad's is_grads_batched; its fallback takes no lists.
TORCH_LIBRARY_IMPL(mylayers, Batched, m) {
  m.impl("sequential", forward_kernel<sequential_formula>);
  m.impl("sequential_outputs", forward_kernel<sequential_outputs_formula>);
  m.impl("sequential_backward", backward_kernel<sequential_backward_formula>);
}
TORCH_LIBRARY_IMPL(mylayers, FuncTorchBatched, m) {
  m.impl("sequential", forward_kernel<sequential_formula>);
  m.impl("sequential_outputs", forward_kernel<sequential_outputs_formula>);
  m.impl("sequential_backward", backward_kernel<sequential_backward_formula>);
}

}  // namespace mylayers
