// The programs of mylayers::sequential: their grammar, and what their backward reads.
#include "sequential.h"

#include <c10/util/irange.h>

#include <array>
#include <charconv>

#include "linear_act.h"

namespace mylayers {
namespace {

// The parts between separators; one more than there are separators.
std::vector<std::string_view> split(std::string_view text, std::string_view separator) {
  std::vector<std::string_view> parts;
  for (;;) {
    const size_t at = text.find(separator);
    parts.push_back(text.substr(0, at));
    if (at == std::string_view::npos) {
      return parts;
    }
    text = text.substr(at + separator.size());
  }
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
  if (const auto activation = activation_named(step)) {
    return {Step::Kind::kActivation, *activation};
  }
  const auto parts = split(step, "+");
  if (parts[0] == "linear" || parts[0] == "linear_t") {
    Step linear{Step::Kind::kLinear};
    linear.transposed = parts[0] == "linear_t";
    size_t part = 1;
    linear.has_bias = part < parts.size() && parts[part] == "bias";
    part += linear.has_bias;
    if (part < parts.size()) {
      const auto activation = activation_named(parts[part++]);
      if (!activation.has_value()) {
        refuse_step(step, program);
      }
      linear.activation = *activation;
    }
    if (part != parts.size()) {
      refuse_step(step, program);
    }
    return linear;
  }
  const std::string_view name = step.substr(0, step.find('('));
  if (name != "center" && name != "flatten") {
    refuse_step(step, program);
  }
  Step other{name == "center" ? Step::Kind::kCenter : Step::Kind::kFlatten};
  if (name.size() < step.size()) {
    if (step.back() != ')') {
      refuse_step(step, program);
    }
    for (const auto number :
         split(step.substr(name.size() + 1, step.size() - name.size() - 2), ",")) {
      int64_t dim = 0;
      const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), dim);
      if (error != std::errc() || end != number.data() + number.size()) {
        refuse_step(step, program);
      }
      other.dims.push_back(dim);
    }
  }
  if (name == "flatten" && other.dims.size() != 2) {
    refuse_step(step, program);
  }
  return other;
}

}  // namespace

Program::Program(std::string_view given) : text(given) {
  for (const auto step : split(text, "; ")) {
    steps.push_back(parse_step(step, text));
    outputs += steps.back().computes();
    parameters += steps.back().parameters();
  }
  TORCH_CHECK_VALUE(
      steps.back().computes(),
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

Reads::Reads(const Program& program, const GradientsAskedFor& asked)
    : outputs(program.outputs), parameters(program.parameters) {
  TORCH_CHECK_VALUE(
      asked.size() == 1 + program.parameters, "sequential_backward: output_mask must have ",
      1 + program.parameters, " entries, for the input and each parameter of \"", program.text,
      "\"; got ", asked.size());
  size_t output = 0, parameter = 0;
  bool before = asked[0];  // some gradient before this step is asked for
  for (const Step& step : program.steps) {
    bool here = false;
    if (step.kind == Step::Kind::kLinear) {
      const bool weight = asked[1 + parameter];
      here = weight || (step.has_bias && asked[2 + parameter]);
      parameters[parameter] = before;
      if (weight && output == 0) {
        input = true;
      } else if (weight) {
        outputs[output - 1] = true;
      }
      parameter += step.parameters();
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
    const OptionalTensor t = list.get(i);
    if (t.has_value() && t->defined()) {
      given[i] = t->resolve_neg();  // the dispatcher does so for every list but these
    }
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
