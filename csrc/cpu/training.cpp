// A step of training through a small chain of linear layers: the kernels one after another, on one
// thread. What lies between layers is no tensor, and nothing is asked twice.
#include "../training.h"

#include <c10/util/irange.h>

#include <algorithm>

#include "linear_gradients.h"
#include "linear_layer.h"
#include "machine/tuning.h"
#include "scratch.h"

namespace mylayers::cpu {
namespace {

template <class T>
struct ChainLayer : LinearLayer<T> {
  const LinearStep* step;
  Matrix<T> x;  // what it reads
  T* y;         // what it makes
};

template <class T>
std::vector<at::Tensor> gradients_of(
    const at::Tensor& input, at::TensorList parameters, const Program& program,
    const GradientsAskedFor& asked, c10::function_ref<at::Tensor(const at::Tensor&)> gradient_of) {
  const int64_t rows = input.size(0);
  c10::SmallVector<ChainLayer<T>, 8> layers;
  int64_t between = 0, widest = 0, weights = 0;
  for (const LinearStep* step : program.linear_steps) {
    const at::Tensor& weight = parameters[step->first_parameter];
    const T* bias = step->has_bias ? data<T>(parameters[step->first_parameter + 1]) : nullptr;
    const ChainLayer<T> layer = {LinearLayer<T>(*step, weight, bias), step, {}, nullptr};
    between += rows * layer.units;
    widest = std::max(widest, layer.units);
    weights += weight.numel() * static_cast<int64_t>(sizeof(T));
    layers.push_back(layer);
  }
  const at::Tensor output = empty_like_of(input, {rows, layers.back().units});
  between -= rows * layers.back().units;
  const Scratch<T> made(between + 2 * rows * widest);
  T* next = made.get();
  Matrix<T> x = matrix<T>(input);
  for (ChainLayer<T>& layer : layers) {
    const bool is_last = &layer == &layers.back();
    layer.x = x;
    layer.y = is_last ? mutable_data<T>(output) : next;
    gemm<T>(
        rows, layer.units, layer.in_units, x, layer.weight, layer.bias, layer.step->activation,
        layer.y, weights);
    x = {layer.y, layer.units, 1};
    next += is_last ? 0 : rows * layer.units;
  }

  const at::Tensor grad_output = gradient_of(output);
  if (!grad_output.defined()) {
    return {};
  }
  T* const dxs[2] = {next, next + rows * widest};
  std::vector<at::Tensor> gradients(program.parameters);
  const auto contiguous = grad_output.expect_contiguous();
  Matrix<T> dy = {data<T>(*contiguous), layers.back().units, 1};
  for (size_t l = layers.size(); l-- > 0;) {
    const ChainLayer<T>& layer = layers[l];
    const size_t first = layer.step->first_parameter;
    const bool goes_on =
        std::find(asked.begin() + 1, asked.begin() + 1 + first, true) != asked.begin() + 1 + first;
    LinearGradients<T> of = {rows,    layer.in_units, layer.units,
                             dy,      layer.y,        layer.step->activation,
                             layer.x, layer.weight,   layer.step->transposed};
    of.dx = goes_on ? dxs[l % 2] : nullptr;
    if (asked[1 + first]) {
      gradients[first] = empty_like_of(input, parameters[first].sizes());
      of.dw = mutable_data<T>(gradients[first]);
    }
    if (layer.step->has_bias && asked[2 + first]) {
      gradients[first + 1] = empty_like_of(input, {layer.units});
      of.db = mutable_data<T>(gradients[first + 1]);
    }
    linear_gradients<T>(of);
    if (!goes_on) {
      break;
    }
    dy = {of.dx, layer.in_units, 1};
  }
  gradients.erase(
      std::remove_if(
          gradients.begin(), gradients.end(), [](const at::Tensor& g) { return !g.defined(); }),
      gradients.end());
  return gradients;
}

}  // namespace

bool is_small_chain(const at::Tensor& input, at::TensorList parameters, const Program& program) {
  const auto dtype = input.scalar_type();
  if (!program.is_line || program.linear_steps.size() != program.steps.size() ||
      parameters.size() != program.parameters || input.dim() != 2 || input.size(0) == 0 ||
      (dtype != at::kFloat && dtype != at::kDouble)) {
    return false;
  }
  int64_t in_units = input.size(1), work = 0;
  for (const LinearStep* step : program.linear_steps) {
    const auto own = program.parameters_of(*step, parameters);
    if (!are_parameters_of(*step, input, in_units, own) ||
        (step->has_bias && !own[1].is_contiguous())) {
      return false;
    }
    in_units = own[0].size(step->transposed ? 0 : 1);
    work += own[0].numel();
  }
  // So little that threads would not pay.
  return static_cast<double>(work) * static_cast<double>(input.size(0)) <= machine().serial_work;
}

std::vector<at::Tensor> small_chain_gradients(
    const at::Tensor& input, at::TensorList parameters, const Program& program,
    const GradientsAskedFor& asked, c10::function_ref<at::Tensor(const at::Tensor&)> gradient_of) {
  return input.scalar_type() == at::kFloat
             ? gradients_of<float>(input, parameters, program, asked, gradient_of)
             : gradients_of<double>(input, parameters, program, asked, gradient_of);
}

}  // namespace mylayers::cpu
