// The Python module mylayers._C: entries for eager calls of the operators, and facts
// about this build. The only file that includes Python headers; a program without Python
// links the others.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/Exceptions.h>

#include <string>

#include "center.h"
#include "cpu/gemm.h"
#include "cpu/huge_pages.h"
#include "linear_act.h"

namespace py = pybind11;

namespace {

// The two operators' entries take their arguments by position through CPython's own calling
// convention: pybind11's, with its argument records, costs a fifth of a small call.

const at::Tensor& tensor_argument(const char* op, const char* name, PyObject* value) {
  TORCH_CHECK_TYPE(
      THPVariable_Check(value), op, ": ", name, " must be a torch.Tensor; got ",
      Py_TYPE(value)->tp_name);
  return THPVariable_Unpack(value);
}

void check_count(const char* op, Py_ssize_t count, Py_ssize_t expected) {
  TORCH_CHECK_TYPE(count == expected, op, ": takes ", expected, " arguments; got ", count);
}

int64_t dim_argument(py::handle value) {
  // __index__ covers int and NumPy's integers, and refuses floats; bool has it too.
  const auto index = py::reinterpret_steal<py::object>(
      PyBool_Check(value.ptr()) ? nullptr : PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    TORCH_CHECK_TYPE(
        false, "center: dim must be None, an int or a sequence of ints; got ",
        Py_TYPE(value.ptr())->tp_name);
  }
  int overflow = 0;
  const int64_t dim = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  TORCH_CHECK_VALUE(
      overflow == 0, "center: dim must fit in 64 bits; got ", std::string(py::str(index)));
  return dim;
}

// Multiply-adds, or elements, up to which a call keeps the GIL: it is over in a microsecond,
// of which handing the GIL on and taking it back would be a sixth.
constexpr int64_t kShort = 1 << 14;

// f's tensor, given to Python. Other threads may run meanwhile, unless it is a short call.
template <class F>
PyObject* wrapped(bool is_short, F&& f) {
  at::Tensor output;
  if (is_short) {
    output = f();
  } else {
    const py::gil_scoped_release other_threads_may_run;
    output = f();
  }
  return THPVariable_Wrap(std::move(output));
}

bool has_plain_sizes(const at::Tensor& t) {
  return t.is_cpu() && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

// (input, weight, bias or None, activation or None)
PyObject* linear_act(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr const char* op = "linear_act";
  check_count(op, count, 4);
  const at::Tensor& x = tensor_argument(op, "input", args[0]);
  const at::Tensor& w = tensor_argument(op, "weight", args[1]);
  mylayers::OptionalTensor b;
  if (args[2] != Py_None) {
    b = tensor_argument(op, "bias", args[2]);
  }
  mylayers::ActivationName act;
  if (args[3] != Py_None) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_Check(args[3]) ? PyUnicode_AsUTF8AndSize(args[3], &size) : nullptr;
    if (text == nullptr) {
      PyErr_Clear();
      TORCH_CHECK_TYPE(
          false, op, ": activation must be a str or None; got ", Py_TYPE(args[3])->tp_name);
    }
    act = std::string_view(text, static_cast<size_t>(size));
  }
  const bool is_short = has_plain_sizes(x) && has_plain_sizes(w) && w.dim() == 2 &&
                        w.size(1) <= kShort && x.numel() * w.size(1) <= kShort;
  return wrapped(is_short, [&] { return mylayers::linear_act(x, w, b, act); });
  END_HANDLE_TH_ERRORS
}

// (input, None, an int or a sequence of them)
PyObject* center(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("center", count, 2);
  const at::Tensor& x = tensor_argument("center", "input", args[0]);
  const py::handle dim = args[1];
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
  const bool is_short = has_plain_sizes(x) && x.numel() <= kShort;
  return wrapped(is_short, [&] { return mylayers::center(x, list); });
  END_HANDLE_TH_ERRORS
}

PyMethodDef kOperators[] = {
    {"linear_act", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_act)),
     METH_FASTCALL, "linear_act(input, weight, bias, activation)"},
    {"center", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(center)), METH_FASTCALL,
     "center(input, dim)"},
    {nullptr, nullptr, 0, nullptr}};

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
  info["huge_pages"] = mylayers::cpu::wants_huge_pages();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of mylayers; use mylayers.functional and mylayers.MyLinear.";
  if (PyModule_AddFunctions(m.ptr(), kOperators) != 0) {
    throw py::error_already_set();
  }
  m.def("build_info", build_info);
}
