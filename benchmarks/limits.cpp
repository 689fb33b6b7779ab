// What bounds any implementation on this machine: how fast its cores multiply and add, and what
// an operator costs that computes nothing. Compiled on first use by limits.py, for the very
// processor it runs on.
#include <ATen/EmptyTensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/Exceptions.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "peaks.h"

namespace py = pybind11;

namespace {

// ---- Calls -------------------------------------------------------------------------------
//
// Operators with the arguments of mylayers::linear_act that compute nothing, each with one more
// step of a real call than the one before.

using Bias = std::optional<at::Tensor>;
using Name = std::optional<std::string_view>;

at::Tensor dispatched(const at::Tensor&, const at::Tensor&, const Bias&, Name) { return {}; }

at::Tensor allocated(const at::Tensor& input, const at::Tensor& weight, const Bias&, Name) {
  return at::detail::empty_cpu(
      {input.size(0), weight.size(1)}, input.scalar_type(), /*pin_memory=*/false, std::nullopt);
}

using Operator = c10::TypedOperatorHandle<decltype(allocated)>;

Operator find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<decltype(allocated)>();
}

at::Tensor call_differentiable(
    const at::Tensor& input, const at::Tensor& weight, const Bias& bias, Name name) {
  static const Operator op = find("mylayers_limits::differentiable");
  return op.call(input, weight, bias, name);
}

// Its gradients are none at all: backward is the engine's own work.
struct EmptyNode : torch::autograd::Function<EmptyNode> {
  static at::Tensor forward(
      torch::autograd::AutogradContext*, const at::Tensor& input, const at::Tensor& weight,
      const Bias& bias, Name name) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_differentiable(input, weight, bias, name);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext*, const torch::autograd::variable_list&) {
    return torch::autograd::variable_list(4);
  }
};

at::Tensor differentiable(
    const at::Tensor& input, const at::Tensor& weight, const Bias& bias, Name name) {
  const bool wanted = input.requires_grad() || weight.requires_grad() ||
                      (bias.has_value() && bias->requires_grad());
  if (wanted && at::GradMode::is_enabled()) {
    return EmptyNode::apply(input, weight, bias, name);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_differentiable(input, weight, bias, name);
}

template <typename Function>
py::object call(
    const Function& function, py::handle input, py::handle weight, py::handle bias,
    py::handle name) {
  HANDLE_TH_ERRORS
  const at::Tensor& x = THPVariable_Unpack(input.ptr());
  const at::Tensor& w = THPVariable_Unpack(weight.ptr());
  const Bias b = bias.is_none() ? Bias() : Bias(THPVariable_Unpack(bias.ptr()));
  Py_ssize_t size = 0;
  const char* text = name.is_none() ? nullptr : PyUnicode_AsUTF8AndSize(name.ptr(), &size);
  const Name n = text == nullptr ? Name() : Name(std::string_view(text, size));
  at::Tensor output;
  {
    const py::gil_scoped_release other_threads_may_run;
    output = function(x, w, b, n);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output)));
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace

TORCH_LIBRARY(mylayers_limits, m) {
  for (const char* name : {"dispatched", "allocated", "differentiable"}) {
    const auto schema =
        std::string(name) + "(Tensor input, Tensor weight, Tensor? bias, str? name) -> Tensor";
    m.def(schema.c_str());
  }
}

TORCH_LIBRARY_IMPL(mylayers_limits, CPU, m) {
  m.impl("dispatched", dispatched);
  m.impl("allocated", allocated);
  m.impl("differentiable", allocated);
}

// Where nothing is registered here, PyTorch would put a boxed, slower kernel of its own.
TORCH_LIBRARY_IMPL(mylayers_limits, Autograd, m) {
  m.impl("dispatched", torch::CppFunction::makeFallthrough());
  m.impl("allocated", torch::CppFunction::makeFallthrough());
  m.impl("differentiable", differentiable);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("peaks", peaks, py::call_guard<py::gil_scoped_release>());
  m.def("entry", [](py::handle input, py::handle weight, py::handle bias, py::handle name) {
    return call(dispatched, input, weight, bias, name);
  });
  m.def("dispatched", [](py::handle input, py::handle weight, py::handle bias, py::handle name) {
    static const Operator op = find("mylayers_limits::dispatched");
    return call([](const auto&... all) { return op.call(all...); }, input, weight, bias, name);
  });
  m.def("allocated", [](py::handle input, py::handle weight, py::handle bias, py::handle name) {
    static const Operator op = find("mylayers_limits::allocated");
    return call([](const auto&... all) { return op.call(all...); }, input, weight, bias, name);
  });
  m.def(
      "differentiable", [](py::handle input, py::handle weight, py::handle bias, py::handle name) {
        return call(call_differentiable, input, weight, bias, name);
      });
}
