// sequential on the CPU: runs of linear layers a block of rows at a time, so that what one layer
// writes is in cache when the next reads it.
#include "../sequential.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "activation.h"
#include "gemm.h"
#include "gemm_aten.h"
#include "linear_layer.h"
#include "machine/tuning.h"
#include "scratch.h"

namespace mylayers {
namespace cpu {
namespace {

// Rows that go through all layers together: those of one task of gemm.
constexpr int64_t kBlockRows = 256;
// Two blocks of wider layers would leave level-2 cache, and their products no longer wait for it.
constexpr int64_t kWidestBlock = 512;
// Rows per thread below which layers are shared by columns, as gemm does, instead of rows.
constexpr int64_t kLeastRows = 32;

template <class T>
struct Layer : LinearLayer<T> {
  Activation activation;
  T* sums;    // where X @ W + b is kept, if backward reads it
  T* output;  // null: only the next layer reads it
};

template <class T>
void run_layers(int64_t rows, Matrix<T> x, c10::ArrayRef<Layer<T>> layers) {
  int64_t widest = 0;
  double work = 0;
  int64_t weights = 0;  // bytes
  bool whole = false;   // PyTorch's products share rows among threads themselves
  for (const auto& layer : layers) {
    widest = std::max(widest, layer.output ? 0 : layer.units);
    weights += layer.in_units * layer.units * static_cast<int64_t>(sizeof(T));
    work += static_cast<double>(rows) * static_cast<double>(layer.in_units) *
            static_cast<double>(layer.units);
    whole = whole || is_aten_product(rows, layer.units, layer.in_units);
  }
  const auto run_rows = [&](int64_t first, int64_t count) {
    const Scratch<T> between(2 * count * widest);
    Matrix<T> in = x.at(first, 0);
    for (size_t l = 0; l < layers.size(); ++l) {
      const auto& layer = layers[l];
      T* out = layer.output ? layer.output + first * layer.units
                            : between.get() + l % 2 * (count * widest);
      T* sums = layer.sums ? layer.sums + first * layer.units : out;
      gemm<T>(
          count, layer.units, layer.in_units, in, layer.weight, layer.bias,
          layer.sums ? Activation::kNone : layer.activation, sums, weights);
      if (layer.sums) {
        activate(count * layer.units, sums, layer.activation, out);
      }
      in = {out, layer.units, 1};
    }
  };
  const int64_t threads =
      work <= machine().serial_work || at::in_parallel_region() ? 1 : at::get_num_threads();
  if (whole || widest > kWidestBlock || (threads > 1 && rows < threads * kLeastRows)) {
    run_rows(0, rows);
    return;
  }
  const int64_t share = (rows + threads - 1) / threads;
  const int64_t mr = kernels().product<acc_t<T>>().mr;
  const int64_t block = std::min(kBlockRows, (share + mr - 1) / mr * mr);
  const int64_t blocks = rows == 0 ? 0 : (rows + block - 1) / block;
  const auto run_blocks = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      run_rows(b * block, std::min(block, rows - b * block));
    }
  };
  if (threads == 1) {
    run_blocks(0, blocks);
  } else {
    at::parallel_for(0, blocks, 1, run_blocks);
  }
}

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

// A linear step, and the activation that follows it as a step of its own, if there is one.
struct LinearAndActivation {
  const LinearStep* linear;
  const ActivationStep* activation = nullptr;

  const Step& last() const { return activation ? static_cast<const Step&>(*activation) : *linear; }
};

// Those of which each reads only what the one before it makes. An activation whose derivative is a
// function of its output stands in the linear step.
c10::SmallVector<LinearAndActivation, 8> linear_run_from(const Program& program, size_t first) {
  c10::SmallVector<LinearAndActivation, 8> run;
  for (size_t i = first; i < program.steps.size(); ++i) {
    const Step& step = *program.steps[i];
    if (!run.empty()) {
      const size_t before = run.back().last().value;
      if (step.inputs[0] != before || program.values[before].readers != 1) {
        break;
      }
    }
    if (const LinearStep* const linear = step.as_linear()) {
      run.push_back({linear});
      continue;
    }
    const ActivationStep* const activation = step.as_activation();
    if (!activation || run.empty() || run.back().activation ||
        run.back().linear->activation != Activation::kNone ||
        !reads_input(activation->activation)) {
      break;
    }
    run.back().activation = activation;
  }
  return run;
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
           keeps_all && step.activation ? allocate(linear) : nullptr,
           keeps_all || &step == &steps.back() ? allocate(step.last()) : nullptr});
    }
    const Rows x(input);
    run_layers<T>(x.count, x.matrix<T>(), layers);
  });
}

constexpr StepFunctions kKernels = {activation, activation_backward, linear_act_gradients};

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
