// sequential as its layers one by one. Each is a call through the dispatcher, which finds that
// layer's kernel, shape rule or formula for whatever device, mode or transform this runs under.
#include "../sequential.h"

#include <torch/library.h>

namespace mylayers {

std::vector<at::Tensor> sequential_outputs_formula(
    const at::Tensor& input, at::TensorList parameters, const Program& program) {
  program.check_parameters(parameters);
  Run run(program, input);
  for (const auto& step : program.steps) {
    run.set(
        *step,
        step->forward(run.inputs_of(*step), program.parameters_of(*step, parameters), kFormulas));
  }
  return run.outputs();
}

at::Tensor sequential_formula(
    const at::Tensor& input, at::TensorList parameters, const Program& program) {
  return sequential_outputs_formula(input, parameters, program).back();
}

std::vector<at::Tensor> sequential_backward_formula(
    at::TensorList grad_outputs, const at::Tensor& input, at::TensorList outputs,
    at::TensorList parameters, c10::SymIntArrayRef flattened, const Program& program,
    const GradientsAskedFor& asked) {
  return sequential_backward_by(
      kFormulas, grad_outputs, input, outputs, parameters, flattened, program, asked);
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
