// What mylayers._C knows of modules: of networks which of their children one program computes, of
// layers and losses what they are, each with the state of the module that this holds for.
//
// mylayers/stock.py decides; before each call a module is compared with what was decided on. That
// comparison runs no Python code: it compares identities, place by place, and looks nothing up. So
// while it lasts nothing that it has seen can be taken away. Whatever is used once Python code may
// run again, or the GIL has been given up, is owned by the call.
#pragma once

#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../sequential.h"
#include "../training.h"

namespace mylayers::plans {

namespace py = pybind11;

// ---- a module's state --------------------------------------------------------------------------

struct Entry;

// All entries of a dictionary in their order.
struct State {
  std::vector<Entry> entries;
  // Those of which more is asked than to be there, and all behind the last of them. A dictionary
  // keeps its entries in the order in which they came, so a new one stands behind these.
  std::vector<Py_ssize_t> telling = {};
};

// An entry of a dictionary: in this place, under this very key, with such a value.
struct Entry {
  // As mylayers/stock.py numbers them.
  enum class Must {
    kBeThere,
    kBeThis,     // the value itself
    kBeEmpty,    // a dictionary without entries
    kBeFilled,   // anything else
    kBeWeight,   // a tensor, of no class of its own
    kBeBias,     // the same
    kBeForeign,  // anything else
    kHold,       // a dictionary of such entries
    kBeHooks,    // of a module whose forward may run all the same
    kBeModules,  // of a network
  };
  py::object key;
  Must must;
  PyObject* value = nullptr;  // of kBeThis
  py::object kept;            // the same, where it can refer to nothing
  State held = {};
};

// Whether a value refers to no object that could refer to a module; what is known of modules holds
// nothing else, so that the cycle collector need not look into it. Another value's address may come
// to be that of another object, which then only keeps a child that runs by itself doing so.
inline bool is_atom(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
      if (!PyLong_CheckExact(PyTuple_GET_ITEM(value, i))) {
        return false;
      }
    }
    return true;
  }
  return value == Py_None || PyBool_Check(value) || PyLong_CheckExact(value) ||
         PyFloat_CheckExact(value) || PyUnicode_CheckExact(value);
}

inline State state_of(const py::handle& entries) {
  State state;
  for (const py::handle item : py::reinterpret_borrow<py::tuple>(entries)) {
    const auto entry = item.cast<py::tuple>();
    Entry made{entry[0], static_cast<Entry::Must>(entry[1].cast<int>())};
    const py::object value = entry[2];
    if (made.must == Entry::Must::kHold) {
      made.held = state_of(value);
    } else if (made.must == Entry::Must::kBeThis) {
      made.value = value.ptr();
      made.kept = is_atom(value.ptr()) ? value : py::object();
    }
    state.entries.push_back(std::move(made));
  }
  const auto count = static_cast<Py_ssize_t>(state.entries.size());
  const auto tells = [&](Py_ssize_t i) { return state.entries[i].must != Entry::Must::kBeThere; };
  Py_ssize_t last = count - 1;
  while (last >= 0 && !tells(last)) {
    --last;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i > last || tells(i)) {
      state.telling.push_back(i);
    }
  }
  return state;
}

// What a comparison comes across; the tensors are borrowed, until Python code may run.
struct Found {
  PyObject* weight = nullptr;
  PyObject* bias = nullptr;
  py::object modules;
  bool foreign = false;  // a parameter of a class of its own
  bool hooks = false;    // of a module whose forward may run all the same
  // Dictionaries that it depends on beside the one that has them: that of the parameters, and those
  // that are empty, or are not.
  PyObject* parameters = nullptr;
  c10::SmallVector<PyObject*, 4> empty, filled;
};

inline bool is_dictionary(PyObject* value) {
  return PyDict_CheckExact(value) || PyODict_CheckExact(value);
}

bool fits(const State& state, PyObject* dictionary, Found& found);

inline bool fits(const Entry& entry, PyObject* value, Found& found) {
  const auto is_empty = [&] { return is_dictionary(value) && PyDict_GET_SIZE(value) == 0; };
  switch (entry.must) {
    case Entry::Must::kBeThere:
      return true;
    case Entry::Must::kBeThis:
      return value == entry.value;
    case Entry::Must::kBeEmpty:
      found.empty.push_back(value);
      return is_empty();
    case Entry::Must::kBeFilled:
      found.filled.push_back(value);
      return !is_empty();
    case Entry::Must::kBeWeight:
      found.weight = value;
      return THPVariable_CheckExact(value);
    case Entry::Must::kBeBias:
      found.bias = value;
      return THPVariable_CheckExact(value);
    case Entry::Must::kBeForeign:
      found.foreign = true;
      return !THPVariable_CheckExact(value);
    case Entry::Must::kHold:
      found.parameters = value;
      return is_dictionary(value) && fits(entry.held, value, found);
    case Entry::Must::kBeHooks:
      (is_empty() ? found.empty : found.filled).push_back(value);
      found.hooks = found.hooks || !is_empty();
      return true;
    case Entry::Must::kBeModules:
      found.modules = py::reinterpret_borrow<py::object>(value);
      return PyDict_CheckExact(value);
  }
  return false;
}

inline bool fits(const State& state, PyObject* dictionary, Found& found) {
  const auto count = static_cast<Py_ssize_t>(state.entries.size());
  if (PyDict_GET_SIZE(dictionary) != count) {
    return false;
  }
  const size_t empty = found.empty.size(), filled = found.filled.size();
  PyObject *key = nullptr, *value = nullptr;
  bool in_place = true;
  for (const Py_ssize_t i : state.telling) {
    Py_ssize_t place = i;
    in_place = PyDict_Next(dictionary, &place, &key, &value) && key == state.entries[i].key.ptr();
    if (!in_place) {
      break;
    }
    if (!fits(state.entries[i], value, found)) {
      return false;
    }
  }
  Py_ssize_t place = count;
  if (in_place && !PyDict_Next(dictionary, &place, &key, &value)) {
    return true;
  }
  place = 0;  // an entry was taken out once, and those behind it stand one place further back
  found.empty.resize(empty);
  found.filled.resize(filled);
  for (const Entry& entry : state.entries) {
    if (!PyDict_Next(dictionary, &place, &key, &value) || key != entry.key.ptr() ||
        !fits(entry, value, found)) {
      return false;
    }
  }
  return true;
}

// CPython's own number for a state of a class, which no other state of any class ever has; 0 if
// there is none.
inline unsigned version(PyTypeObject* cls) { return cls->tp_version_tag; }

inline unsigned fresh_version(PyTypeObject* cls, PyObject* name) {
  _PyType_Lookup(cls, name);  // gives the class its number
  return version(cls);
}

// CPython's own number for a state of a dictionary, which no other state of any ever has; 0 from
// 3.12 on, which no longer promises one.
inline uint64_t version([[maybe_unused]] PyObject* dictionary) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dictionary)->ma_version_tag;
#else
  return 0;
#endif
}

// What the last comparison came across, for as long as the dictionaries have not changed since.
// Borrowed from them.
class Last {
 public:
  bool holds(PyObject* dictionary, Found& found) const {
    const auto has_entries = [](PyObject* d) { return PyDict_GET_SIZE(d) != 0; };
    if (version_ == 0 || version_ != version(dictionary) ||
        (parameters_ != nullptr && parameters_version_ != version(parameters_)) ||
        std::any_of(empty_.begin(), empty_.end(), has_entries) ||
        !std::all_of(filled_.begin(), filled_.end(), has_entries) ||
        (weight_ != nullptr && !THPVariable_CheckExact(weight_)) ||
        (bias_ != nullptr && !THPVariable_CheckExact(bias_))) {
      return false;
    }
    found.weight = weight_;
    found.bias = bias_;
    found.modules = py::reinterpret_borrow<py::object>(modules_);
    found.hooks = hooks_;
    return true;
  }

  void note(PyObject* dictionary, const Found& found) {
    const bool plain = !found.foreign && std::all_of(
                                             found.filled.begin(), found.filled.end(),
                                             [](PyObject* d) { return is_dictionary(d); });
    version_ = plain ? version(dictionary) : 0;
    if (version_ == 0) {
      return;
    }
    parameters_ = found.parameters;
    parameters_version_ = parameters_ == nullptr ? 0 : version(parameters_);
    empty_ = found.empty;
    filled_ = found.filled;
    weight_ = found.weight;
    bias_ = found.bias;
    modules_ = found.modules.ptr();
    hooks_ = found.hooks;
  }

 private:
  uint64_t version_ = 0, parameters_version_ = 0;
  PyObject *parameters_ = nullptr, *weight_ = nullptr, *bias_ = nullptr, *modules_ = nullptr;
  c10::SmallVector<PyObject*, 4> empty_, filled_;
  bool hooks_ = false;
};

// A module: of which class, and in which state of its __dict__.
struct Kind {
  unsigned version = 0;               // of the class; 0: the class alone is asked for
  const PyTypeObject* cls = nullptr;  // compared, never looked into
  bool has_state = false;             // otherwise it does not matter
  State state;
  mutable Last last;
};

// (class, version or 0, entries or None)
inline Kind kind_of(const py::handle& given) {
  const auto parts = given.cast<py::tuple>();
  Kind kind;
  kind.cls = reinterpret_cast<const PyTypeObject*>(parts[0].cast<py::object>().ptr());
  kind.version = parts[1].cast<unsigned>();
  if (const py::object entries = parts[2]; !entries.is_none()) {
    kind.has_state = true;
    kind.state = state_of(entries);
  }
  return kind;
}

inline bool has_class(const Kind& kind, PyObject* module) {
  return Py_TYPE(module) == kind.cls &&
         (kind.version == 0 || kind.version == version(Py_TYPE(module)));
}

inline bool fits(const Kind& kind, PyObject* module, Found& found) {
  if (!has_class(kind, module)) {
    return false;
  }
  if (!kind.has_state) {
    return true;
  }
  const auto own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  if (!own) {
    PyErr_Clear();
    return false;
  }
  if (kind.last.holds(own.ptr(), found)) {
    return true;
  }
  const bool as_it_must = fits(kind.state, own.ptr(), found);  // the module keeps its dictionary
  if (as_it_must) {
    kind.last.note(own.ptr(), found);
  }
  return as_it_must;
}

// ---- what is known -----------------------------------------------------------------------------

// Consecutive children: of one program, or one that runs by itself.
struct Part {
  std::optional<Program> program;
  std::vector<Kind> children;
};

struct Plan {
  // What a call without hooks comes to, as mylayers/sequential.py numbers it.
  enum class Call {
    kOtherwise,
    kForward,   // to its forward, whatever that is
    kChildren,  // to nothing but the parts, or to children in a way of their own
  };

  Kind network;  // as forward depends on it; without a state, its class may do anything
  Kind called;   // as a call does
  Call call = Call::kOtherwise;
  uint64_t replaced = 0;  // which functions that layers call were, see watched_functions.h
  bool iterates = false;  // as nn.Sequential does; otherwise there are no parts
  Py_ssize_t siblings = 0;
  std::vector<Part> parts;

  bool is_one_chain() const { return parts.size() == 1 && parts[0].program.has_value(); }
};

struct Layer {
  Kind kind;
  bool is_stock;  // all else looks its parameters up as ever
  Activation activation;
};

struct Loss {
  Kind kind;
  std::optional<Criterion> criterion;  // none where it must be called
};

// What is known of objects while they live, of each in the last few states; no object is kept
// alive for it, compared or hashed.
template <class T>
class Known {
 public:
  using States = c10::SmallVector<std::shared_ptr<const T>, 4>;

  const States& of(PyObject* object) const {
    static const States none;
    const auto found = records_.find(object);
    return found == records_.end() ? none : found->second.states;
  }

  void keep(const py::object& object, T known) {
    constexpr size_t kKept = 4;  // in training and not, with a hook and without
    auto made = std::make_shared<const T>(std::move(known));
    auto record = records_.find(object.ptr());
    if (record == records_.end()) {
      // Made first: memory for it may be what the cycle collector runs for.
      py::object reference = py::weakref(object, forget(object.ptr()));
      record = records_.try_emplace(object.ptr()).first;
      if (!record->second.reference) {
        record->second.reference = std::move(reference);
      }
    }
    States& states = record->second.states;
    if (states.size() == kKept) {
      states.pop_back();
    }
    states.insert(states.begin(), std::move(made));
  }

  size_t size() const { return records_.size(); }

 private:
  struct Record {
    py::object reference;
    States states;
  };

  py::cpp_function forget(PyObject* object) {
    return [this, object](const py::handle& reference) {
      const auto record = records_.find(object);
      if (record != records_.end() && record->second.reference.is(reference)) {
        const Record last = std::move(record->second);
        records_.erase(record);
      }
    };
  }

  std::unordered_map<PyObject*, Record> records_;
};

}  // namespace mylayers::plans
