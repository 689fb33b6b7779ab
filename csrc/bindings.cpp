// The Python module mylayers._C: typed entries for eager calls of the operators, and facts
// about this build. The only file that includes Python headers; a program without Python
// links the others.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/Exceptions.h>

#include <string>

#include "center.h"
#include "cpu/gemm.h"
#include "linear_act.h"

namespace py = pybind11;

namespace {

// A pybind11 caster for Tensor would try, fail and report all overloads; this names the
// argument.
const at::Tensor& tensor_argument(const char* op, const char* name, py::handle value) {
  if (!THPVariable_Check(value.ptr())) {
    throw py::type_error(
        std::string(op) + ": " + name + " must be a torch.Tensor; got " +
        Py_TYPE(value.ptr())->tp_name);
  }
  return THPVariable_Unpack(value.ptr());
}

int64_t dim_argument(py::handle value) {
  // __index__ covers int and NumPy's integers, and refuses floats; bool has it too.
  const auto index = py::reinterpret_steal<py::object>(
      PyBool_Check(value.ptr()) ? nullptr : PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(
        std::string("center: dim must be None, an int or a sequence of ints; got ") +
        Py_TYPE(value.ptr())->tp_name);
  }
  int overflow = 0;
  const int64_t dim = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) {
    throw py::value_error("center: dim must fit in 64 bits; got " + std::string(py::str(index)));
  }
  return dim;
}

py::object linear_act(py::handle input, py::handle weight, py::handle bias, py::handle activation) {
  HANDLE_TH_ERRORS
  constexpr const char* op = "linear_act";
  const at::Tensor& x = tensor_argument(op, "input", input);
  const at::Tensor& w = tensor_argument(op, "weight", weight);
  mylayers::OptionalTensor b;
  if (!bias.is_none()) {
    b = tensor_argument(op, "bias", bias);
  }
  mylayers::ActivationName act;
  if (!activation.is_none()) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_Check(activation.ptr())
                           ? PyUnicode_AsUTF8AndSize(activation.ptr(), &size)
                           : nullptr;
    if (text == nullptr) {
      throw py::type_error(
          std::string("linear_act: activation must be a str or None; got ") +
          Py_TYPE(activation.ptr())->tp_name);
    }
    act = std::string_view(text, static_cast<size_t>(size));
  }
  at::Tensor output;
  {
    const py::gil_scoped_release other_threads_may_run;
    output = mylayers::linear_act(x, w, b, act);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output)));
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object center(py::handle input, py::handle dim) {
  HANDLE_TH_ERRORS
  const at::Tensor& x = tensor_argument("center", "input", input);
  c10::SmallVector<int64_t, 6> dims;
  if (!dim.is_none()) {
    if (PySequence_Check(dim.ptr()) && !PyUnicode_Check(dim.ptr()) && !PyBytes_Check(dim.ptr())) {
      for (const py::handle d : py::reinterpret_borrow<py::sequence>(dim)) {
        dims.push_back(dim_argument(d));
      }
    } else {
      dims.push_back(dim_argument(dim));
    }
  }
  const auto list = dim.is_none() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(dims);
  at::Tensor output;
  {
    const py::gil_scoped_release other_threads_may_run;
    output = mylayers::center(x, list);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(output)));
  END_HANDLE_TH_ERRORS_PYBIND
}

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("g++ ") + __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["torch"] = MYLAYERS_TORCH_VERSION;
  info["compiler"] = compiler();
  info["cplusplus"] = static_cast<int64_t>(__cplusplus);
#if defined(__x86_64__)
  info["instruction_sets"] = py::make_tuple("generic", "avx2", "avx512");
#else
  info["instruction_sets"] = py::make_tuple("generic");
#endif
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda"] = py::none();
  info["kernels"] = mylayers::cpu::kernels().name;
  info["bfloat16_units"] = mylayers::cpu::has_bf16_units();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of mylayers; use mylayers.functional and mylayers.MyLinear.";
  m.def(
      "linear_act", linear_act, py::arg("input"), py::arg("weight"), py::arg("bias") = py::none(),
      py::arg("activation") = "relu");
  m.def("center", center, py::arg("input"), py::arg("dim") = py::none());
  m.def("build_info", build_info);
}
