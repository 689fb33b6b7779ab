// Eager calls of the operators.
#include "entries.h"

#include <string>
#include <string_view>

#include "../center.h"
#include "arguments.h"
#include "gil.h"

namespace mylayers::python {

PyObject* run_linear_act(Held& tensors, bool has_bias, Activation activation) {
  const at::Tensor &x = tensors[0], &w = tensors[1];
  const auto at_most = [&](int64_t work) {
    return w.size(1) <= work && x.numel() * w.size(1) <= work;
  };
  const bool keeps_gil = has_plain_sizes(x) && has_plain_sizes(w) && w.dim() == 2 &&
                         (at_most(kShort) || at_most(short_now()));
  const at::Tensor none;
  const auto shortcut = shortcut_of({&x, &w, has_bias ? &tensors[2] : &none});
  return wrapped(keeps_gil, shortcut, tensors, [&] {
    return linear_act_by(
        shortcut, x, w, has_bias ? OptionalTensor(tensors[2]) : std::nullopt, activation);
  });
}

namespace {

// (input, weight, bias or None, activation or None)
PyObject* linear_act(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr const char* op = "linear_act";
  check_count(op, count, 4);
  Held tensors;
  tensors.take(tensor_argument(op, "input", args[0]));
  tensors.take(tensor_argument(op, "weight", args[1]));
  if (args[2] != Py_None) {
    tensors.take(tensor_argument(op, "bias", args[2]));
  }
  ActivationName name;
  if (args[3] != Py_None) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_Check(args[3]) ? PyUnicode_AsUTF8AndSize(args[3], &size) : nullptr;
    if (text == nullptr) {
      PyErr_Clear();
      TORCH_CHECK_TYPE(
          false, op, ": activation must be a str or None; got ", Py_TYPE(args[3])->tp_name);
    }
    name = std::string_view(text, static_cast<size_t>(size));
  }
  return run_linear_act(tensors, args[2] != Py_None, parse_activation(name));
  END_HANDLE_TH_ERRORS
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

// (input, None, an int or a sequence of them)
PyObject* center(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("center", count, 2);
  Held tensors;
  tensors.take(tensor_argument("center", "input", args[0]));
  const py::handle dim = args[1];
  c10::SmallVector<int64_t, 6> dims;
  if (!dim.is_none()) {
    if (PySequence_Check(dim.ptr()) && !PyUnicode_Check(dim.ptr()) && !PyBytes_Check(dim.ptr())) {
      // A sequence may make its items as they are asked for, and may change meanwhile.
      const auto listed = owned(PySequence_Tuple(dim.ptr()));
      for (const py::handle d : py::reinterpret_borrow<py::tuple>(listed)) {
        dims.push_back(dim_argument(d));
      }
    } else {
      dims.push_back(dim_argument(dim));
    }
  }
  const auto list = dim.is_none() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(dims);
  const at::Tensor& x = tensors[0];
  const auto shortcut = shortcut_of({&x});
  return wrapped(has_plain_sizes(x) && x.numel() <= kShort, shortcut, tensors, [&] {
    return center_by(shortcut, x, list);
  });
  END_HANDLE_TH_ERRORS
}

PyMethodDef kOperators[] = {
    entry("linear_act", linear_act, "linear_act(input, weight, bias, activation)"),
    entry("center", center, "center(input, dim)"),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_operators(py::module_& m) { add_entries(m, kOperators); }

}  // namespace mylayers::python
