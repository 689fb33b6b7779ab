// The programs of mylayers::sequential: their grammar, and what their backward reads.
#include "sequential.h"

#include <c10/util/irange.h>

#include <charconv>

#include "linear_act.h"

namespace mylayers {
namespace {

// The text up to `separator`, which is taken off as well, or all of it.
std::string_view take_until(std::string_view& text, std::string_view separator) {
  const size_t at = text.find(separator);
  const std::string_view part = text.substr(0, at);
  text = at == std::string_view::npos ? std::string_view() : text.substr(at + separator.size());
  return part;
}

[[noreturn]] void refuse_step(std::string_view step, std::string_view program) {
  TORCH_CHECK_VALUE(
      false,
      "sequential: program must name steps linear, linear_t (each with +bias and an activation if "
      "it has them), relu, tanh, sigmoid, elu, center, center(d,...) or flatten(first,last), "
      "separated by \"; \"; got \"",
      step, "\" in \"", program, "\"");
}

std::optional<Activation> activation_named(std::string_view name) {
  for (const auto a :
       {Activation::kRelu, Activation::kTanh, Activation::kSigmoid, Activation::kElu}) {
    if (*activation_name(a) == name) {
      return a;
    }
  }
  return std::nullopt;
}

Step parse_step(const std::string_view step, std::string_view program) {
  std::string_view rest = step;
  if (const auto activation = activation_named(step)) {
    return {Step::Kind::kActivation, *activation};
  }
  if (step.substr(0, 6) == "linear") {
    const std::string_view name = take_until(rest, "+");
    Step parsed{Step::Kind::kLinear};
    parsed.transposed = name == "linear_t";
    if (!parsed.transposed && name != "linear") {
      refuse_step(step, program);
    }
    std::string_view part = take_until(rest, "+");
    parsed.has_bias = part == "bias";
    if (parsed.has_bias) {
      part = take_until(rest, "+");
    }
    if (!part.empty()) {
      const auto activation = activation_named(part);
      if (!activation.has_value()) {
        refuse_step(step, program);
      }
      parsed.activation = *activation;
    }
    if (!rest.empty()) {
      refuse_step(step, program);
    }
    return parsed;
  }
  const std::string_view name = take_until(rest, "(");
  Step parsed{name == "center" ? Step::Kind::kCenter : Step::Kind::kFlatten};
  if (name != "center" && name != "flatten") {
    refuse_step(step, program);
  }
  if (name.size() < step.size()) {
    std::string_view list = take_until(rest, ")");
    if (!rest.empty() || step.back() != ')') {
      refuse_step(step, program);
    }
    do {
      const std::string_view number = take_until(list, ",");
      int64_t dim = 0;
      const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), dim);
      if (error != std::errc() || end != number.data() + number.size()) {
        refuse_step(step, program);
      }
      parsed.dims.push_back(dim);
    } while (!list.empty());
  }
  if (name == "flatten" && parsed.dims.size() != 2) {
    refuse_step(step, program);
  }
  return parsed;
}

}  // namespace

Program::Program(std::string_view given) : text(given) {
  std::string_view rest = text;
  do {
    steps.push_back(parse_step(take_until(rest, "; "), text));
    outputs += steps.back().computes();
    parameters += steps.back().parameters();
  } while (!rest.empty());
  TORCH_CHECK_VALUE(
      steps.back().computes(),
      "sequential: program must not end in a flatten, which computes nothing; got \"", text, "\"");
}

void Program::check_parameters(at::TensorList given) const {
  TORCH_CHECK_VALUE(
      given.size() == parameters, "sequential: parameters must hold ", parameters,
      " tensors for \"", text, "\"; got ", given.size());
}

Reads::Reads(const Program& program, const GradientsAskedFor& asked)
    : outputs(program.outputs), parameters(program.parameters) {
  TORCH_CHECK_VALUE(
      asked.size() == 1 + program.parameters, "sequential_backward: output_mask must have ",
      1 + program.parameters, " entries, for the input and each parameter of \"", program.text,
      "\"; got ", asked.size());
  size_t output = 0, parameter = 0;
  bool before = asked[0];  // some gradient before this step is asked for
  const auto read_step_input = [&] {
    if (output == 0) {
      input = true;
    } else {
      outputs[output - 1] = true;
    }
  };
  for (const Step& step : program.steps) {
    bool here = false;
    if (step.kind == Step::Kind::kLinear) {
      const bool weight = asked[1 + parameter];
      here = weight || (step.has_bias && asked[2 + parameter]);
      parameters[parameter] = before;
      if (weight) {
        read_step_input();
      }
      parameter += step.parameters();
    } else if (step.kind == Step::Kind::kFlatten && before) {
      read_step_input();  // for its sizes
    }
    before = before || here;
    if (step.computes()) {
      outputs[output] = outputs[output] || (before && step.activation != Activation::kNone);
      ++output;
    }
  }
}

std::vector<at::Tensor> tensors(const OptionalTensorList& list) {
  std::vector<at::Tensor> given(list.size());
  for (const auto i : c10::irange(list.size())) {
    given[i] = list.get(i).value_or(at::Tensor());
  }
  return given;
}

OptionalTensorList optional_tensors(at::TensorList list) {
  OptionalTensorList given;
  given.reserve(list.size());
  for (const at::Tensor& t : list) {
    given.push_back(t.defined() ? std::optional(t) : std::nullopt);
  }
  return given;
}

}  // namespace mylayers
