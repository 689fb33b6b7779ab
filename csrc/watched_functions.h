// The functions that layers look up by name whenever they are called (mylayers/_watched.py).
// Whoever replaces one means it to be called, so a chain computes for its layers only while all are
// in place. They are looked up anew where the module or class that has them has changed; to look
// them up at every call would be 2 % of a small one.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace mylayers {

#if PY_VERSION_HEX >= 0x030C0000
// How often any of the modules has changed; stays 0 where Python has no watcher left to give.
inline uint64_t module_changes = 1;

inline int count_change(PyDict_WatchEvent, PyObject*, PyObject*, PyObject*) {
  module_changes += module_changes != 0;
  return 0;
}
#endif

// Prepares a module for version_of.
inline void watch(PyObject* module) {
#if PY_VERSION_HEX >= 0x030C0000
  static const int watcher = PyDict_AddWatcher(count_change);
  if (watcher < 0 || PyDict_Watch(watcher, PyModule_GetDict(module)) != 0) {
    PyErr_Clear();
    module_changes = 0;
  }
#endif
}

// Of a module or a class: another number after any change; 0 where nobody knows.
inline uint64_t version_of(PyObject* owner) {
  if (PyType_Check(owner)) {
    return reinterpret_cast<PyTypeObject*>(owner)->tp_version_tag;
  }
#if PY_VERSION_HEX >= 0x030C0000
  return module_changes;
#else
  return reinterpret_cast<PyDictObject*>(PyModule_GetDict(owner))->ma_version_tag;
#endif
}

class WatchedFunctions {
 public:
  // Those that layers of this class call.
  void add(const pybind11::handle cls) {
    namespace py = pybind11;
    const auto called = py::module_::import("mylayers._watched").attr("called_by")(cls);
    for (const py::handle item : called) {
      const auto place = item.cast<py::tuple>();
      functions_.push_back({place[0], place[1], place[2]});
      PyObject* owner = functions_.back().owner.ptr();
      const auto is_this = [&](const Owner& other) { return other.owner == owner; };
      if (std::none_of(owners_.begin(), owners_.end(), is_this)) {
        if (PyModule_Check(owner)) {
          watch(owner);
        }
        owners_.push_back({owner, 0});
      }
    }
    look();
  }

  bool are_in_place() {
    for (const auto& [owner, version] : owners_) {
      if (version == 0 || version != version_of(owner)) {
        look();
        break;
      }
    }
    return are_in_place_;
  }

 private:
  struct Function {
    pybind11::object owner, name, original;
  };
  struct Owner {
    PyObject* owner;
    uint64_t version;  // that the last look was at
  };

  void look() {
    are_in_place_ = std::all_of(functions_.begin(), functions_.end(), [](const Function& f) {
      PyObject* owner = f.owner.ptr();
      PyObject* found = PyModule_Check(owner)
                            ? PyDict_GetItemWithError(PyModule_GetDict(owner), f.name.ptr())
                            : _PyType_Lookup(reinterpret_cast<PyTypeObject*>(owner), f.name.ptr());
      return found == f.original.ptr();
    });
    for (Owner& owner : owners_) {
      owner.version = version_of(owner.owner);
    }
  }

  std::vector<Function> functions_;
  std::vector<Owner> owners_;
  bool are_in_place_ = true;
};

}  // namespace mylayers
