// Every operator's schema, its way through the dispatcher and the checks on its
// arguments. Kernels register themselves at the end of their own files.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>
#include <charconv>

#include "center.h"
#include "dispatch/questions.h"
#include "linear_act.h"
#include "sequential.h"

TORCH_LIBRARY(mylayers, m) {
  m.set_python_module("mylayers");
  m.def(
      "linear_act(Tensor input, Tensor weight, Tensor? bias=None, str? activation=\"relu\") "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_act_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? output, "
      "str? activation, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def("center(Tensor input, int[1]? dim=None) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "sequential(Tensor input, Tensor[] parameters, str program) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "sequential_outputs(Tensor input, Tensor[] parameters, str program) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "sequential_backward(Tensor?[] grad_outputs, Tensor? input, Tensor?[] outputs, "
      "Tensor?[] parameters, SymInt[] flattened, str program, bool[] output_mask) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
}

namespace mylayers {
namespace {

// "linear_act: weight must be on cpu like input; got meta", and the same for dtypes.
void check_like(
    const char* op, const char* name, const at::Tensor& t, const char* first_name,
    const at::Tensor& first) {
  TORCH_CHECK(
      t.device() == first.device(), op, ": ", name, " must be on ", first.device(), " like ",
      first_name, "; got ", t.device());
  TORCH_CHECK(
      t.scalar_type() == first.scalar_type(), op, ": ", name, " must have the dtype of ",
      first_name, ", ", first.scalar_type(), "; got ", t.scalar_type());
  check_memory(op, name, t);
}

void check_weight_rank(const char* op, const at::Tensor& weight) {
  TORCH_CHECK(
      weight.dim() == 2, op, ": weight must be 2-D, (in_units, units); got ", weight.dim(), "-D, ",
      weight.sym_sizes());
}

void check_input_rank(const char* op, const char* name, const at::Tensor& input) {
  TORCH_CHECK(
      input.dim() >= 1, op, ": ", name, " must have at least one dimension, (..., ",
      name == std::string_view("input") ? "in_units" : "units", "); got a 0-D tensor");
}

const at::Tensor& require(const char* name, const OptionalTensor& t, const char* purpose) {
  TORCH_CHECK_VALUE(
      t.has_value() && t->defined(), "linear_act_backward: ", name, " must be a tensor for ",
      purpose, "; got None");
  return *t;
}

}  // namespace

void check_memory(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(
      has_memory(t), op, ": ", name, " must have the memory of its elements, ", t.sizes(),
      "; got a storage of ", t.storage().nbytes(), " bytes");
}

std::optional<Activation> activation_named(std::string_view name) {
  const size_t open = name.find('(');
  for (size_t i = 1; i < kActivations.size(); ++i) {
    const auto kind = static_cast<ActivationKind>(i);
    if (name.substr(0, open) != row_of(kind).name) {
      continue;
    }
    if (open == std::string_view::npos) {
      return kind;
    }
    // "0.5)"
    const std::string_view rest = name.substr(open + 1);
    double setting = 0;
    const auto [end, error] = std::from_chars(rest.begin(), rest.end(), setting);
    const bool is_number =
        error == std::errc() && setting >= kLeastSetting && setting <= kLargestSetting;
    return row_of(kind).has_setting() && is_number && std::string_view(end, rest.end()) == ")"
               ? std::optional(Activation(kind, setting))
               : std::nullopt;
  }
  return std::nullopt;
}

std::string activation_names() {
  std::string names;
  for (size_t i = 1; i < kActivations.size(); ++i) {
    names.append(i == 1 ? "" : ", ").append(kActivations[i].name);
    names.append(kActivations[i].has_setting() ? "[(x)]" : "");
  }
  return names + " with x from 0.0001 to 100";
}

Activation parse_activation(ActivationName name) {
  if (!name.has_value()) {
    return Activation::kNone;
  }
  const auto found = activation_named(*name);
  TORCH_CHECK_VALUE(
      found.has_value(), "linear_act: activation must be one of ", activation_names(),
      " or None; got \"", *name, "\"");
  return *found;
}

std::optional<std::string> activation_name(Activation activation) {
  if (activation == Activation::kNone) {
    return std::nullopt;
  }
  std::string name(row_of(activation).name);
  if (activation.setting != row_of(activation).setting) {
    std::array<char, 32> digits;
    const auto end = std::to_chars(digits.begin(), digits.end(), activation.setting).ptr;
    name.append("(").append(digits.begin(), end).append(")");
  }
  return name;
}

void check_linear_act(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  constexpr const char* op = "linear_act";
  check_memory(op, "input", input);
  check_like(op, "weight", weight, "input", input);
  check_weight_rank(op, weight);
  check_input_rank(op, "input", input);
  TORCH_SYM_CHECK(
      input.sym_size(-1).sym_eq(weight.sym_size(0)), op,
      ": weight must be (in_units, units) with in_units = ", input.sym_size(-1), " to match input ",
      input.sym_sizes(), "; got weight ", weight.sym_sizes());
  if (bias.has_value() && bias->defined()) {
    check_like(op, "bias", *bias, "input", input);
    TORCH_CHECK(
        bias->dim() == 1, op, ": bias must be 1-D, (units); got ", bias->dim(), "-D, ",
        bias->sym_sizes());
    TORCH_SYM_CHECK(
        bias->sym_size(0).sym_eq(weight.sym_size(1)), op,
        ": bias must be (units) with units = ", weight.sym_size(1), " to match weight ",
        weight.sym_sizes(), "; got bias ", bias->sym_sizes());
  }
}

void check_linear_act_backward(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask, bool transposed) {
  constexpr const char* op = "linear_act_backward";
  check_memory(op, "grad_output", grad_output);
  check_input_rank(op, "grad_output", grad_output);
  // t has the sizes of grad_output in all dimensions but the last `free`.
  const auto check_sizes = [&](const char* name, const at::Tensor& t, int64_t free) {
    check_like(op, name, t, "grad_output", grad_output);
    bool same = t.dim() == grad_output.dim();
    for (int64_t d = 0; same && d < t.dim() - free; ++d) {
      same = t.sym_size(d) == grad_output.sym_size(d);
    }
    TORCH_CHECK(
        same, op, ": ", name, " must have the sizes of grad_output, ", grad_output.sym_sizes(),
        free ? ", but for the last" : "", "; got ", t.sym_sizes());
  };
  if (mask[0]) {
    const auto& w = require("weight", weight, "the gradient of input");
    check_like(op, "weight", w, "grad_output", grad_output);
    check_weight_rank(op, w);
    TORCH_SYM_CHECK(
        w.sym_size(transposed ? 0 : 1).sym_eq(grad_output.sym_size(-1)), op, ": weight must be ",
        transposed ? "(units, in_units)" : "(in_units, units)",
        " with units = ", grad_output.sym_size(-1), " to match grad_output ",
        grad_output.sym_sizes(), "; got weight ", w.sym_sizes());
  }
  if (mask[1]) {
    check_sizes("input", require("input", input, "the gradient of weight"), 1);
  }
  TORCH_CHECK_VALUE(
      !reads_input(activation), op,
      ": activation must be one whose derivative is a function of its "
      "output; got \"",
      row_of(activation).name, "\"");
  if (activation != Activation::kNone) {
    check_sizes("output", require("output", output, "an activation's derivative"), 0);
  }
}

c10::SmallVector<int64_t, 6> center_dims(const at::Tensor& input, at::OptionalIntArrayRef dim) {
  check_memory("center", "input", input);
  const int64_t rank = input.dim();
  c10::SmallVector<int64_t, 6> dims;
  if (!dim.has_value() || dim->empty()) {
    for (const auto d : c10::irange(rank)) {
      dims.push_back(d);
    }
    return dims;
  }
  const int64_t wrap = std::max<int64_t>(rank, 1);  // a 0-D tensor takes dim 0 and -1
  for (const int64_t d : *dim) {
    TORCH_CHECK_INDEX(
        d >= -wrap && d < wrap, "center: dim must be in [", -wrap, ", ", wrap - 1, "] for a ", rank,
        "-D input; got ", d);
    const int64_t wrapped = d < 0 ? d + wrap : d;
    TORCH_CHECK(
        std::find(dims.begin(), dims.end(), wrapped) == dims.end(),
        "center: dim must name each dimension once; got dimension ", wrapped, " twice in ", *dim);
    dims.push_back(wrapped);
  }
  std::sort(dims.begin(), dims.end());
  if (rank == 0) {
    dims.clear();
  }
  return dims;
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

namespace {

template <class Signature>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

at::Tensor dispatch_linear_act(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    Activation activation) {
  static const auto op =
      operator_named<decltype(linear_act_kernel<linear_act>)>("mylayers::linear_act");
  return op.call(input, weight, bias, activation_name(activation));
}

at::Tensor linear_act(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    Activation activation) {
  const at::Tensor none;
  const auto shortcut = shortcut_of({&input, &weight, bias.has_value() ? &*bias : &none});
  return linear_act_by(shortcut, input, weight, bias, activation);
}

at::Tensor linear_act_by(
    Shortcut shortcut, const at::Tensor& input, const at::Tensor& weight,
    const OptionalTensor& bias, Activation activation) {
  switch (shortcut) {
    case Shortcut::kKernel:
      return cpu::linear_act(input, weight, bias, activation);
    case Shortcut::kRecorded:
      return record_linear_act(input, weight, bias, activation, cpu::linear_act);
    case Shortcut::kNone:
      break;
  }
  return dispatch_linear_act(input, weight, bias, activation);
}

Gradients dispatch_linear_act_backward(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask) {
  static const auto op = operator_named<decltype(linear_act_backward_kernel<linear_act_backward>)>(
      "mylayers::linear_act_backward");
  return op.call(grad_output, input, weight, output, activation_name(activation), mask);
}

Gradients linear_act_backward(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask) {
  const at::Tensor none;
  const auto given = [&](const OptionalTensor& t) { return t.has_value() ? &*t : &none; };
  const bool direct =
      leads_to_cpu_kernel({&grad_output, given(input), given(weight), given(output)});
  return (direct ? cpu::linear_act_backward : dispatch_linear_act_backward)(
      grad_output, input, weight, output, activation, mask);
}

at::Tensor dispatch_center(const at::Tensor& input, at::OptionalIntArrayRef dim) {
  static const auto op = operator_named<decltype(center)>("mylayers::center");
  return op.call(input, dim);
}

at::Tensor center(const at::Tensor& input, at::OptionalIntArrayRef dim) {
  return center_by(shortcut_of({&input}), input, dim);
}

at::Tensor center_by(Shortcut shortcut, const at::Tensor& input, at::OptionalIntArrayRef dim) {
  switch (shortcut) {
    case Shortcut::kKernel:
      return cpu::center(input, dim);
    case Shortcut::kRecorded:
      return record_center(input, dim, cpu::center);
    case Shortcut::kNone:
      break;
  }
  return dispatch_center(input, dim);
}

at::Tensor dispatch_sequential(
    const at::Tensor& input, at::TensorList parameters, const Program& program) {
  static const auto op = operator_named<ForwardKernel>("mylayers::sequential");
  return op.call(input, parameters, program.text);
}

at::Tensor sequential(const at::Tensor& input, at::TensorList parameters, const Program& program) {
  return sequential_by(shortcut_of(arguments(input, {parameters})), input, parameters, program);
}

at::Tensor sequential_by(
    Shortcut shortcut, const at::Tensor& input, at::TensorList parameters, const Program& program) {
  switch (shortcut) {
    case Shortcut::kKernel:
      return cpu::sequential(input, parameters, program);
    case Shortcut::kRecorded:
      return record_sequential(input, parameters, program, cpu::sequential_outputs).back();
    case Shortcut::kNone:
      break;
  }
  return dispatch_sequential(input, parameters, program);
}

std::vector<at::Tensor> dispatch_sequential_outputs(
    const at::Tensor& input, at::TensorList parameters, const Program& program) {
  static const auto op = operator_named<OutputsKernel>("mylayers::sequential_outputs");
  return op.call(input, parameters, program.text);
}

std::vector<at::Tensor> dispatch_sequential_backward(
    at::TensorList grad_outputs, const at::Tensor& input, at::TensorList outputs,
    at::TensorList parameters, c10::SymIntArrayRef flattened, const Program& program,
    const GradientsAskedFor& asked) {
  static const auto op = operator_named<BackwardKernel>("mylayers::sequential_backward");
  c10::List<bool> mask;
  for (const bool wanted : asked) {
    mask.push_back(wanted);
  }
  return op.call(
      optional_tensors(grad_outputs), input.defined() ? std::optional(input) : std::nullopt,
      optional_tensors(outputs), optional_tensors(parameters), flattened, program.text, mask);
}

std::vector<at::Tensor> sequential_backward(
    at::TensorList grad_outputs, const at::Tensor& input, at::TensorList outputs,
    at::TensorList parameters, c10::SymIntArrayRef flattened, const Program& program,
    const GradientsAskedFor& asked) {
  const bool direct = leads_to_cpu_kernel(arguments(input, {grad_outputs, outputs, parameters}));
  return (direct ? cpu::sequential_backward : dispatch_sequential_backward)(
      grad_outputs, input, outputs, parameters, flattened, program, asked);
}

}  // namespace mylayers
