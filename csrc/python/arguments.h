// How mylayers._C is called. Its entries take their arguments by position through CPython's own
// calling convention: a small call notices pybind11's, with its argument records.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/Exceptions.h>

namespace mylayers::python {

namespace py = pybind11;

using Entry = PyObject*(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

inline PyMethodDef entry(const char* name, Entry* function, const char* signature) {
  return {
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
      signature};
}

// The last of them is empty.
inline void add_entries(py::module_& m, PyMethodDef* entries) {
  if (PyModule_AddFunctions(m.ptr(), entries) != 0) {
    throw py::error_already_set();
  }
}

inline PyObject* tensor_argument(const char* op, const char* name, PyObject* value) {
  TORCH_CHECK_TYPE(
      THPVariable_Check(value), op, ": ", name, " must be a torch.Tensor; got ",
      Py_TYPE(value)->tp_name);
  return value;
}

inline void check_count(const char* op, Py_ssize_t count, Py_ssize_t expected) {
  TORCH_CHECK_TYPE(count == expected, op, ": takes ", expected, " arguments; got ", count);
}

}  // namespace mylayers::python
