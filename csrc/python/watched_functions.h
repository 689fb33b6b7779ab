// The functions that layers look up by name whenever they are called (mylayers/_watched.py).
// Whoever replaces one means it to be called, so a chain computes only for layers whose functions
// are all in place. They are looked up anew where the module or class that has them has changed; a
// small call would notice to look them up each time.
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
  WatchedFunctions() = default;

  // Each (module or class, name, what is there unless somebody has replaced it).
  explicit WatchedFunctions(const pybind11::tuple& functions) {
    namespace py = pybind11;
    for (const py::handle item : functions) {
      const auto place = item.cast<py::tuple>();
      functions_.push_back({place[0], place[1], place[2]});
      PyObject* owner = functions_.back().owner.ptr();
      const auto has_owner = [&](const Owner& other) { return other.owner == owner; };
      if (std::none_of(owners_.begin(), owners_.end(), has_owner)) {
        if (PyModule_Check(owner)) {
          watch(owner);
        }
        owners_.push_back({owner, 0});
      }
    }
    look();
  }

  // Which of them are replaced, a bit for each: 0 if none is, another number for other ones.
  uint64_t replaced() {
    for (const auto& [owner, version] : owners_) {
      if (version == 0 || version != version_of(owner)) {
        look();
        break;
      }
    }
    return replaced_;
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
    replaced_ = 0;
    for (size_t i = 0; i < functions_.size(); ++i) {  // there are less than 64
      const Function& f = functions_[i];
      PyObject* owner = f.owner.ptr();
      PyObject* found = PyModule_Check(owner)
                            ? PyDict_GetItemWithError(PyModule_GetDict(owner), f.name.ptr())
                            : _PyType_Lookup(reinterpret_cast<PyTypeObject*>(owner), f.name.ptr());
      if (found != f.original.ptr()) {
        replaced_ |= uint64_t(1) << i;
      }
    }
    for (Owner& owner : owners_) {
      owner.version = version_of(owner.owner);
    }
  }

  std::vector<Function> functions_;
  std::vector<Owner> owners_;
  uint64_t replaced_ = 0;
};

}  // namespace mylayers
