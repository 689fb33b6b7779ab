// What entries that follow a plan have in common: plans by object, and what makes them refuse.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <pybind11/pybind11.h>

#include <memory>

#include "plans.h"
#include "watched_functions.h"

namespace mylayers::python {

namespace py = pybind11;

// Outlives the interpreter's own end.
template <class T>
plans::Known<T>& known() {
  static auto& once = *new plans::Known<T>();
  return once;
}

// What of it holds for an object as `is_this` sees it; none if nothing does. The caller owns it.
template <class T, class Is>
std::shared_ptr<const T> known_of(PyObject* object, const Is& is_this) {
  // By index and owned: what is_this allocates may run the cycle collector, which runs anything.
  const auto& states = known<T>().of(object);
  for (size_t i = 0; i < states.size(); ++i) {
    std::shared_ptr<const T> state = states[i];
    if (is_this(*state)) {
      return state;
    }
  }
  return nullptr;
}

// What an entry returns that leaves a call to Python; no module can return it.
inline PyObject* refused() {
  static PyObject* const once =
      PyObject_CallNoArgs(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  return once;
}

// Whether something watches calls by their Python name.
inline bool is_watched() {
  return at::impl::torch_function_mode_enabled() || at::tracer::impl::is_dispatch_enabled();
}

// Whether a dictionary has an entry, of those that `watched` was made of: each (module, name, the
// one that was there at import). Who sets PyTorch's aside puts others in their places, as its own
// tests do.
inline bool has_entries(WatchedFunctions& watched, const py::tuple& dictionaries) {
  const bool replaced = watched.replaced() != 0;
  PyObject* places = dictionaries.ptr();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(places); ++i) {
    PyObject* place = PyTuple_GET_ITEM(places, i);
    PyObject* found = PyTuple_GET_ITEM(place, 2);
    if (replaced) {
      PyObject* module = PyTuple_GET_ITEM(place, 0);
      found = PyDict_GetItemWithError(PyModule_GetDict(module), PyTuple_GET_ITEM(place, 1));
    }
    if (found == nullptr || !PyDict_Check(found) || PyDict_GET_SIZE(found) != 0) {
      return true;
    }
  }
  return false;
}

}  // namespace mylayers::python
