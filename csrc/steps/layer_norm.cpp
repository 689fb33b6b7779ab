// layer_norm(d,...,epsilon): X normalised over its last dimensions, which have these sizes.
#include "../layer_norm.h"

#include <cmath>

#include "step.h"

namespace mylayers {
namespace {

struct LayerNormStep : Step {
  explicit LayerNormStep(LayerNorm given) : norm(std::move(given)) {}

  size_t parameters() const override { return has_weight + has_bias; }
  // There its dtype is a matter of the device.
  bool computes_in_autocast_dtype() const override { return false; }

  at::Tensor forward(
      at::TensorList inputs, at::TensorList parameters,
      const StepFunctions& functions) const override {
    const auto parameter = [&](bool given, size_t i) {
      return given ? OptionalTensor(parameters[i]) : std::nullopt;
    };
    return functions.layer_norm(inputs[0], parameter(has_weight, 0), parameter(has_bias, 1), norm);
  }
  ReadByBackward read_by_backward(const GradientsOfStep&) const override {
    ReadByBackward reads = {.inputs = {true}, .parameters = Flags(parameters())};
    if (has_weight) {
      reads.parameters[0] = true;
    }
    return reads;
  }
  Tensors backward(const BackwardArguments& given) const override {
    const auto& asked = given.asked;
    auto [input, weight, bias] = given.functions.layer_norm_backward(
        given.grad_output, given.inputs[0],
        has_weight ? OptionalTensor(given.parameters[0]) : std::nullopt, norm,
        {asked.inputs[0], has_weight && asked.parameters[0], has_bias && asked.parameters[1]});
    return {std::move(input), std::move(weight), std::move(bias)};
  }

  const LayerNorm norm;
  bool has_weight = false, has_bias = false;
};

}  // namespace

std::unique_ptr<Step> parse_layer_norm(const StepText& text) {
  if (text.name != "layer_norm" || text.arguments.size() < 2) {
    return nullptr;
  }
  const c10::ArrayRef<std::string_view> arguments = text.arguments;
  auto sizes = numbers_in<int64_t>(arguments.slice(0, arguments.size() - 1));
  const auto epsilon = numbers_in<double>(arguments.back());
  if (!sizes.has_value() || !epsilon.has_value() || !std::isfinite(epsilon->front())) {
    return nullptr;
  }
  for (const int64_t size : *sizes) {
    if (size < 0) {
      return nullptr;
    }
  }
  auto step = std::make_unique<LayerNormStep>(LayerNorm{std::move(*sizes), epsilon->front()});
  auto suffix = text.suffixes.begin();
  if (suffix != text.suffixes.end() && *suffix == "weight") {
    step->has_weight = true;
    ++suffix;
  }
  if (step->has_weight && suffix != text.suffixes.end() && *suffix == "bias") {
    step->has_bias = true;
    ++suffix;
  }
  return suffix == text.suffixes.end() ? std::move(step) : nullptr;
}

}  // namespace mylayers
