// A program's text becomes steps that know their places.
#include "program.h"

#include <array>

namespace mylayers {
namespace {

// The parts between separators; one more than there are separators.
Texts split(std::string_view text, std::string_view separator) {
  Texts parts;
  for (;;) {
    const size_t at = text.find(separator);
    parts.push_back(text.substr(0, at));
    if (at == std::string_view::npos) {
      return parts;
    }
    text = text.substr(at + separator.size());
  }
}

std::optional<StepText> parse_text(std::string_view text) {
  const auto parts = split(text, "+");
  StepText parsed;
  parsed.suffixes.append(parts.begin() + 1, parts.end());
  parsed.head = parts[0];
  parsed.name = parsed.head.substr(0, parsed.head.find('('));
  if (parsed.has_arguments()) {
    if (!parsed.head.ends_with(')')) {
      return std::nullopt;
    }
    const auto inside = parsed.head.substr(parsed.name.size() + 1);
    parsed.arguments = split(inside.substr(0, inside.size() - 1), ",");
  }
  return parsed;
}

// The step that the text names, and the values that it reads; null for none. `value`: its own.
std::unique_ptr<Step> parse_step(std::string_view text, size_t value) {
  const size_t at = text.find('@');
  const auto parsed = parse_text(text.substr(0, at));
  if (!parsed.has_value()) {
    return nullptr;
  }
  for (StepParser* const parse : kStepParsers) {
    auto step = parse(*parsed);
    if (!step) {
      continue;
    }
    step->value = value;
    step->inputs = {value - 1};
    if (at != std::string_view::npos) {
      auto named = numbers_in<size_t>(split(text.substr(at + 1), ","));
      if (!named.has_value()) {
        return nullptr;
      }
      step->inputs = std::move(*named);
    }
    for (const size_t input : step->inputs) {
      if (input >= value) {
        return nullptr;
      }
    }
    return step->inputs.size() == step->arity() ? std::move(step) : nullptr;
  }
  return nullptr;
}

}  // namespace

Program::Program(std::string_view given) : text(given), values{{.source = 0}} {
  for (const auto part : split(text, "; ")) {
    const size_t value = values.size();
    auto step = parse_step(part, value);
    TORCH_CHECK_VALUE(
        step,
        "sequential: program must name steps linear, linear_t (each with +bias and an activation "
        "if it has them), ",
        activation_names(),
        ", center, center(d,...), layer_norm(d,...,epsilon) (with +weight or +weight+bias), "
        "flatten(first,last) or add@i,j, separated by \"; \", and behind \"@\" the values that a "
        "step reads if not the one before it: 0 is the input, i what the i-th step makes; got \"",
        part, "\" in \"", text, "\"");
    step->first_parameter = parameters;
    step->output = outputs;
    parameters += step->parameters();
    outputs += !step->is_view();
    values.push_back({.source = step->is_view() ? values[step->inputs[0]].source : value});
    for (const size_t input : step->inputs) {
      ++values[input].readers;
      values[input].last = value;
      is_line = is_line && input + 1 == value;
    }
    if (const LinearStep* const linear = step->as_linear()) {
      linear_steps.push_back(linear);
    }
    if (step->parameters() > 0) {
      steps_with_parameters.push_back(step.get());
    }
    casts_as_one = casts_as_one && step->computes_in_autocast_dtype();
    steps.push_back(std::move(step));
  }
  TORCH_CHECK_VALUE(
      !steps.back()->is_view(),
      "sequential: program must not end in a flatten, which computes nothing; got \"", text, "\"");
}

std::shared_ptr<const Program> Program::of(std::string_view text) {
  // Actor, critic, encoder: as many as a thread may well call in turn.
  constexpr size_t kKept = 8;
  static thread_local std::array<std::shared_ptr<const Program>, kKept> kept;
  static thread_local size_t next = 0;
  for (const auto& program : kept) {
    if (program && program->text == text) {
      return program;
    }
  }
  auto parsed = std::make_shared<const Program>(text);
  kept[next] = parsed;
  next = (next + 1) % kKept;
  return parsed;
}

void Program::check_parameters(at::TensorList given) const {
  TORCH_CHECK_VALUE(
      given.size() == parameters, "sequential: parameters must hold ", parameters,
      " tensors for \"", text, "\"; got ", given.size());
}

std::vector<at::Tensor> Run::outputs() const {
  std::vector<at::Tensor> outputs;
  outputs.reserve(program_.outputs);
  for (const auto& step : program_.steps) {
    if (!step->is_view()) {
      outputs.push_back(value(step->value));
    }
  }
  return outputs;
}

}  // namespace mylayers
