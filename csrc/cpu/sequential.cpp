// sequential on the CPU: runs of linear layers a block of rows at a time, so that what one layer
// writes is in cache when the next reads it.
#include "../sequential.h"

#include <ATen/ops/flatten.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "../center.h"
#include "gemm.h"
#include "gemm_aten.h"
#include "matrices.h"
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
// Multiply-adds below which a second thread costs more than it saves.
constexpr double kSerialWork = 1 << 19;

template <class T>
struct Layer {
  int64_t in_units, units;
  Matrix<T> weight;  // (in_units, units)
  const T* bias;
  Activation activation;
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
      gemm<T>(
          count, layer.units, layer.in_units, in, layer.weight, layer.bias, layer.activation, out,
          weights);
      in = {out, layer.units, 1};
    }
  };
  const int64_t threads =
      work <= kSerialWork || at::in_parallel_region() ? 1 : at::get_num_threads();
  if (whole || widest > kWidestBlock || (threads > 1 && rows < threads * kLeastRows)) {
    run_rows(0, rows);
    return;
  }
  const int64_t share = (rows + threads - 1) / threads;
  const int64_t tile = kernels().product<acc_t<T>>().rows;
  const int64_t block = std::min(kBlockRows, (share + tile - 1) / tile * tile);
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
    const at::Tensor& x, int64_t in_units, const Step& step, const at::Tensor* parameters) {
  const at::Tensor& weight = parameters[0];
  const auto alike = [&](const at::Tensor& t) {
    return t.device() == x.device() && t.scalar_type() == x.scalar_type();
  };
  if (x.dim() >= 1 && alike(weight) && weight.dim() == 2 &&
      weight.size(step.transposed ? 1 : 0) == in_units &&
      (!step.has_bias || (alike(parameters[1]) && parameters[1].dim() == 1 &&
                          parameters[1].size(0) == weight.size(step.transposed ? 0 : 1)))) {
    return;
  }
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

// The steps [first, last), all linear. The last one's output; `outputs`, if any, get them all.
at::Tensor linear_steps(
    const at::Tensor& input, const Step* first, const Step* last, const at::Tensor* parameter,
    std::vector<at::Tensor>* outputs) {
  at::Tensor output;
  c10::SmallVector<c10::MaybeOwned<at::Tensor>, 8> biases;
  with_storage_type(input.scalar_type(), [&]<class T>(T) {
    c10::SmallVector<Layer<T>, 8> layers;
    int64_t in_units = input.dim() == 0 ? 0 : input.size(-1);
    c10::SmallVector<int64_t, 6> sizes(input.sizes().begin(), input.sizes().end());
    for (const Step* step = first; step != last; ++step) {
      check_layer(input, in_units, *step, parameter);
      const Matrix<T> w = matrix<T>(parameter[0]);
      const int64_t units = parameter[0].size(step->transposed ? 0 : 1);
      const T* bias = nullptr;
      if (step->has_bias) {
        bias = data<T>(*biases.emplace_back(parameter[1].expect_contiguous()));
      }
      T* out = nullptr;
      if (outputs || step + 1 == last) {
        sizes.back() = units;
        output = empty_like_of(input, sizes);
        out = mutable_data<T>(output);
      }
      if (outputs) {
        outputs->push_back(output);
      }
      layers.push_back(
          {in_units, units, step->transposed ? w.transposed() : w, bias, step->activation, out});
      in_units = units;
      parameter += step->parameters();
    }
    const Rows x(input);
    run_layers<T>(x.count, x.matrix<T>(), layers);
  });
  return output;
}

// The last step's output; `outputs`, if any, get those of all computing steps.
at::Tensor run(
    const at::Tensor& input, at::TensorList parameters, const Program& program,
    std::vector<at::Tensor>* outputs) {
  program.check_parameters(parameters);
  at::Tensor output;
  const at::Tensor* x = &input;
  const at::Tensor* parameter = parameters.data();
  const Step* end = program.steps.data() + program.steps.size();
  for (const Step* step = program.steps.data(); step != end;) {
    const Step* next = step + 1;
    switch (step->kind) {
      case Step::Kind::kLinear:
        while (next != end && next->kind == Step::Kind::kLinear) {
          ++next;
        }
        output = linear_steps(*x, step, next, parameter, outputs);
        for (const Step* s = step; s != next; ++s) {
          parameter += s->parameters();
        }
        break;
      case Step::Kind::kActivation:
        output = activation_formula(*x, step->activation);
        break;
      case Step::Kind::kCenter:
        output = center(*x, step->center_dim());
        break;
      case Step::Kind::kFlatten:
        output = at::flatten(*x, step->dims[0], step->dims[1]);
        break;
    }
    if (outputs && (step->kind == Step::Kind::kActivation || step->kind == Step::Kind::kCenter)) {
      outputs->push_back(output);
    }
    x = &output;
    step = next;
  }
  return output;
}

}  // namespace

at::Tensor sequential(const at::Tensor& input, at::TensorList parameters, const Program& program) {
  return has_kernel(input) ? run(input, parameters, program, /*outputs=*/nullptr)
                           : sequential_formula(input, parameters, program);
}

std::vector<at::Tensor> sequential_outputs(
    const at::Tensor& input, at::TensorList parameters, const Program& program) {
  if (!has_kernel(input)) {
    return sequential_outputs_formula(input, parameters, program);
  }
  std::vector<at::Tensor> outputs;
  outputs.reserve(program.outputs);
  run(input, parameters, program, &outputs);
  return outputs;
}

std::vector<at::Tensor> sequential_backward(
    at::TensorList grad_outputs, const at::Tensor& input, at::TensorList outputs,
    at::TensorList parameters, c10::SymIntArrayRef flattened, const Program& program,
    const GradientsAskedFor& asked) {
  const bool compiled = std::all_of(grad_outputs.begin(), grad_outputs.end(), [](const auto& t) {
    return !t.defined() || has_kernel(t);
  });
  return sequential_backward_by(
      compiled ? linear_act_gradients : linear_backward_formula, grad_outputs, input, outputs,
      parameters, flattened, program, asked);
}

TORCH_LIBRARY_IMPL(mylayers, CPU, m) {
  m.impl("sequential", forward_kernel<sequential>);
  m.impl("sequential_outputs", forward_kernel<sequential_outputs>);
  m.impl("sequential_backward", backward_kernel<sequential_backward>);
}

}  // namespace cpu
}  // namespace mylayers
