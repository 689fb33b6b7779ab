// The functions that layers look up by name whenever they are called (mylayers/_watched.py).
// Whoever replaces one means it to be called, so a chain computes for its layers only while all are
// in place.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

namespace mylayers {

class WatchedFunctions {
 public:
  // Those that layers of this class call.
  void add(const pybind11::handle cls) {
    namespace py = pybind11;
    const auto called = py::module_::import("mylayers._watched").attr("called_by")(cls);
    for (const py::handle item : called) {
      const auto place = item.cast<py::tuple>();
      const Function function{place[0], place[1], place[2]};
      const auto is_this = [&](const Function& other) {
        return other.owner.is(function.owner) && other.name.equal(function.name);
      };
      if (std::none_of(functions_.begin(), functions_.end(), is_this)) {
        functions_.push_back(function);
      }
    }
  }

  bool are_in_place() const {
    for (const auto& [owner, name, original] : functions_) {
      PyObject* found =
          PyModule_Check(owner.ptr())
              ? PyDict_GetItemWithError(PyModule_GetDict(owner.ptr()), name.ptr())
              : _PyType_Lookup(reinterpret_cast<PyTypeObject*>(owner.ptr()), name.ptr());
      if (found != original.ptr()) {
        return false;
      }
    }
    return true;
  }

 private:
  struct Function {
    pybind11::object owner, name, original;  // a module or a class
  };
  std::vector<Function> functions_;
};

}  // namespace mylayers
