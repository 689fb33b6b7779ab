// What mylayers._C does of a region: consecutive layers that a forward calls which a user wrote
// (mylayers/forwards.py). Whatever the forward would read on its way is compared, at each call,
// with what it was when the region was planned; where it differs, the user's own lines run.
#include "forwards.h"

#include <ATen/TracerMode.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../sequential.h"
#include "arguments.h"
#include "chain.h"
#include "held.h"
#include "known.h"
#include "plans.h"

namespace mylayers::python {
namespace {

using plans::Found;
using plans::Kind;

// ---- what is known of a forward ----------------------------------------------------------------

// A name, and the object that it must stand for.
struct Binding {
  py::object name, value;
};

std::vector<Binding> bindings_of(const py::handle& given) {
  std::vector<Binding> made;
  for (const py::handle item : py::reinterpret_borrow<py::tuple>(given)) {
    const auto pair = item.cast<py::tuple>();
    made.push_back({pair[0], pair[1]});
  }
  return made;
}

// A module that a region reads. The first is the one whose forward it is.
struct Node {
  size_t owner;      // the node whose child it is, before this one
  py::object name;   // its key in the owner's _modules
  Py_ssize_t place;  // the same in their order; -1: any
  Kind kind;
  Py_ssize_t size;  // how many children it must have; -1: any number
  // Attributes that are read of it by name, and found in its _modules alone; in its __dict__.
  std::vector<py::object> children;
  std::vector<Binding> attributes;
};

// The forward itself, and what its names stand for. It is compared only where the class of the
// first node has the version that it had then, and thereby this forward.
struct Function {
  PyObject *function, *code;
  std::vector<Binding> globals, builtins;
};

struct Region {
  int64_t site;   // in the forward
  bool is_whole;  // whether it is all that the forward does with its one argument
  Program program;
  std::vector<Node> nodes;
  std::vector<size_t> with_parameters;  // those that have its steps' parameters, in their order
};

// The regions of a module as it was in one state.
struct Regions {
  Kind called;         // as a call of it depends on it
  bool calls_forward;  // whether a call without hooks goes to its forward and does nothing else
  uint64_t replaced;   // which functions that layers call were
  Function function;
  std::vector<Region> all;
};

// How often a region was asked for and none was as planned.
struct Refusals {
  mutable uint64_t count = 0;
};

struct ForwardNames {
  PyObject* forward = PyUnicode_InternFromString("forward");
  PyObject* modules = PyUnicode_InternFromString("_modules");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
  PyObject* buffers = PyUnicode_InternFromString("_buffers");
};

// Outlives the interpreter's own end.
const ForwardNames& forward_names() {
  static const ForwardNames& once = *new ForwardNames();
  return once;
}

// ---- whether it still holds --------------------------------------------------------------------

// A dictionary's value, owned; none if it has none. Keys of odd classes may run Python code here,
// as they would in the lookup that this stands for; what they raise is raised there.
py::object value_of(PyObject* dictionary, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(dictionary, name);
  if (found == nullptr && PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  return borrowed(found);
}

bool hold(const std::vector<Binding>& bindings, PyObject* dictionary) {
  for (const Binding& binding : bindings) {
    if (!value_of(dictionary, binding.name.ptr()).is(binding.value)) {
      return false;
    }
  }
  return true;
}

bool holds(const Function& known) {
  PyObject* function = known.function;
  if (PyFunction_GET_CODE(function) != known.code) {
    return false;
  }
  const py::object globals = borrowed(PyFunction_GET_GLOBALS(function));
  if (!hold(known.globals, globals.ptr())) {
    return false;
  }
  if (known.builtins.empty()) {
    return true;
  }
  for (const Binding& binding : known.builtins) {
    if (value_of(globals.ptr(), binding.name.ptr())) {
      return false;
    }
  }
  const py::object builtins =
      borrowed(reinterpret_cast<PyFunctionObject*>(function)->func_builtins);
  return PyDict_Check(builtins.ptr()) && hold(known.builtins, builtins.ptr());
}

// A module that regions reach, as nn.Module's __getattr__ would find its children.
struct Reached {
  py::object module, modules;
  // Where the last child by its place was found.
  Py_ssize_t place = 0, after = 0;
};

// Whether its attributes are those that are read; finds its _modules.
bool reach(const Node& node, Reached& reached) {
  if (!has_class(node.kind, reached.module.ptr())) {
    return false;
  }
  const bool reads = node.size >= 0 || !node.children.empty() || !node.attributes.empty();
  if (!reads) {
    return true;
  }
  const auto own = owned(PyObject_GenericGetDict(reached.module.ptr(), nullptr));
  if (!hold(node.attributes, own.ptr())) {
    return false;
  }
  reached.modules = value_of(own.ptr(), forward_names().modules);
  if (!reached.modules || !PyDict_CheckExact(reached.modules.ptr()) ||
      (node.size >= 0 && PyDict_GET_SIZE(reached.modules.ptr()) != node.size)) {
    return false;
  }
  if (node.children.empty()) {
    return true;
  }
  const py::object dictionaries[] = {
      own, value_of(own.ptr(), forward_names().parameters),
      value_of(own.ptr(), forward_names().buffers)};
  for (const py::object& dictionary : dictionaries) {
    if (!dictionary || !plans::is_dictionary(dictionary.ptr())) {
      return false;
    }
    if (PyDict_GET_SIZE(dictionary.ptr()) == 0) {
      continue;
    }
    for (const py::object& name : node.children) {
      if (value_of(dictionary.ptr(), name.ptr())) {
        return false;
      }
    }
  }
  return true;
}

py::object child_of(Reached& owner, const Node& node) {
  if (!owner.modules) {
    return {};
  }
  PyObject* modules = owner.modules.ptr();
  if (node.place < 0) {
    return value_of(modules, node.name.ptr());
  }
  if (node.place < owner.place) {
    owner.place = owner.after = 0;
  }
  PyObject *key = nullptr, *child = nullptr;
  for (; owner.place <= node.place; ++owner.place) {
    if (!PyDict_Next(modules, &owner.after, &key, &child)) {
      return {};
    }
  }
  const bool has_key = key == node.name.ptr() ||
                       (PyUnicode_CheckExact(key) && PyUnicode_Compare(key, node.name.ptr()) == 0);
  return has_key ? borrowed(child) : py::object();
}

// Whether a region of a module is as planned, and if so the parameters, behind the input.
bool takes(const Region& region, PyObject* module, PyObject* input, Held& tensors) {
  c10::SmallVector<Reached, 8> reached;
  for (const Node& node : region.nodes) {
    Reached next;
    next.module = reached.empty() ? borrowed(module) : child_of(reached[node.owner], node);
    if (!next.module || !reach(node, next)) {
      return false;
    }
    reached.push_back(std::move(next));
  }
  // Nothing from here on runs Python code.
  c10::SmallVector<Found, 8> found(reached.size());
  for (size_t i = 0; i < reached.size(); ++i) {
    if (!fits(region.nodes[i].kind, reached[i].module.ptr(), found[i])) {
      return false;
    }
  }
  tensors.clear();
  tensors.take(input);
  auto step = region.program.steps_with_parameters.begin();
  for (const size_t i : region.with_parameters) {
    const Found& layer = found[i];
    if (layer.foreign || layer.weight == nullptr || !fits_step(**step++, layer)) {
      return false;
    }
    tensors.take(layer.weight);
    if (layer.bias != nullptr) {
      tensors.take(layer.bias);
    }
  }
  return true;
}

// The result of a region that is as planned; none if the program does not take the tensors, of
// which the user's own lines will say so in their words.
py::object run(const Region& region, Held& tensors) {
  try {
    return owned(run_program(region.program, tensors));
  } catch (const c10::Error&) {
    return {};
  }
}

bool is_plain(PyObject* input) {
  return THPVariable_CheckExact(input) && !is_watched() && !has_global_hooks();
}

// Has new plans made of a module that is in none of the states that were planned for: at its first
// call, and ever more seldom after that.
void note_refusal(PyObject* module) {
  const auto object = borrowed(module);
  if (known<Refusals>().of(module).empty()) {
    known<Refusals>().keep(object, {});
  }
  const std::shared_ptr<const Refusals> refusals = known<Refusals>().of(module).front();
  const uint64_t count = ++refusals->count;
  if ((count & (count - 1)) != 0) {
    return;
  }
  static PyObject* python = nullptr;  // for which no other thread waits, unlike an initializer
  if (python == nullptr) {
    python = py::module_::import("mylayers.forwards").release().ptr();
  }
  py::handle(python).attr("prepare")(object);
}

// ---- entries -----------------------------------------------------------------------------------

// (a module, a site in its forward, input, a list): whether the region there is as planned; its
// result is then in the list. If not, nothing has been done.
PyObject* run_region(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("run_region", count, 4);
  PyObject *module = args[0], *input = args[2];
  if (!is_plain(input)) {
    return Py_NewRef(Py_False);
  }
  const int64_t site = PyLong_AsLongLong(args[1]);
  const uint64_t replaced = replaced_functions();
  const Region* region = nullptr;
  Held tensors;
  const auto known = known_of<Regions>(module, [&](const Regions& state) {
    for (const Region& made : state.all) {
      if (made.site == site && state.replaced == replaced &&
          has_class(made.nodes[0].kind, module) && holds(state.function) &&
          takes(made, module, input, tensors)) {
        region = &made;
        return true;
      }
    }
    return false;
  });
  if (known == nullptr) {
    note_refusal(module);
    return Py_NewRef(Py_False);
  }
  const auto output = run(*region, tensors);
  if (!output) {
    return Py_NewRef(Py_False);
  }
  return PyList_Append(args[3], output.ptr()) == 0 ? Py_NewRef(Py_True) : nullptr;
  END_HANDLE_TH_ERRORS
}

// (a module, its one argument): a call of it. Refused where a call would do more than its forward.
PyObject* call_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("call_forward", count, 2);
  PyObject *module = args[0], *input = args[1];
  if (has_global_hooks() || at::tracer::impl::is_dispatch_enabled()) {
    return Py_NewRef(refused());
  }
  const bool plain = is_plain(input);
  const uint64_t replaced = replaced_functions();
  const Region* whole = nullptr;
  Held tensors;
  const auto known = known_of<Regions>(module, [&](const Regions& state) {
    Found found;
    if (!state.calls_forward || !fits(state.called, module, found) || found.hooks) {
      return false;
    }
    for (const Region& made : state.all) {
      if (made.is_whole && plain && state.replaced == replaced && holds(state.function) &&
          takes(made, module, input, tensors)) {
        whole = &made;
        return true;
      }
    }
    return true;
  });
  if (known == nullptr) {
    if (python::known<Regions>().of(module).empty()) {
      note_refusal(module);
    }
    return Py_NewRef(refused());
  }
  if (whole != nullptr) {
    if (auto output = run(*whole, tensors)) {
      return output.release().ptr();
    }
  }
  tensors.clear();
  return PyObject_CallMethodOneArg(module, forward_names().forward, input);
  END_HANDLE_TH_ERRORS
}

// ((a class of ours, the class that it is for, that one's forward as it was read, its code, its
// defaults, those of keywords), a module): whether it is not for this module, or a forward has come
// into its place.
PyObject* leaves_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("leaves_forward", count, 2);
  const auto given = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(args[0], i); };
  PyObject* function = given(2);
  const auto or_none = [](PyObject* value) { return value == nullptr ? Py_None : value; };
  const bool same =
      reinterpret_cast<PyObject*>(Py_TYPE(args[1])) == given(0) &&
      _PyType_Lookup(reinterpret_cast<PyTypeObject*>(given(1)), forward_names().forward) ==
          function &&
      PyFunction_GET_CODE(function) == given(3) &&
      or_none(PyFunction_GET_DEFAULTS(function)) == given(4) &&
      or_none(PyFunction_GET_KW_DEFAULTS(function)) == given(5);
  return PyBool_FromLong(!same);
  END_HANDLE_TH_ERRORS
}

Node node_of(const py::handle& given) {
  const auto parts = given.cast<py::tuple>();
  Node node{
      parts[0].cast<size_t>(), parts[1], parts[2].cast<Py_ssize_t>(), plans::kind_of(parts[3]),
      parts[4].cast<Py_ssize_t>()};
  for (const py::handle name : parts[5].cast<py::tuple>()) {
    node.children.push_back(py::reinterpret_borrow<py::object>(name));
  }
  node.attributes = bindings_of(parts[6]);
  return node;
}

// A module as a call of it depends on it, as plans.h has it; whether that is a call of its forward;
// the replaced_functions that the regions hold for; the forward, its code, what its names stand for
// in its globals and among the builtins; the regions, each (site, whether it is the whole forward,
// program, nodes, those of them that have its steps' parameters).
void keep_regions(
    const py::object& module, const py::tuple& called, bool calls_forward, uint64_t replaced,
    const py::tuple& function, const py::tuple& regions) {
  Regions made{plans::kind_of(called), calls_forward, replaced};
  made.function = {
      py::object(function[0]).ptr(), py::object(function[1]).ptr(), bindings_of(function[2]),
      bindings_of(function[3])};
  for (const py::handle item : regions) {
    const auto given = item.cast<py::tuple>();
    Region region{
        given[0].cast<int64_t>(), given[1].cast<bool>(), Program(given[2].cast<std::string>())};
    for (const py::handle node : given[3].cast<py::tuple>()) {
      region.nodes.push_back(node_of(node));
    }
    for (const py::handle node : given[4].cast<py::tuple>()) {
      region.with_parameters.push_back(node.cast<size_t>());
    }
    made.all.push_back(std::move(region));
  }
  known<Regions>().keep(module, std::move(made));
}

// Of how many modules something is known here.
size_t known_forwards() { return known<Regions>().size() + known<Refusals>().size(); }

PyMethodDef kForwards[] = {
    entry("run_region", run_region, "run_region(module, site, input, outputs)"),
    entry("call_forward", call_forward, "call_forward(module, input)"),
    entry("leaves_forward", leaves_forward, "leaves_forward(rewriting, module)"),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_forwards(py::module_& m) {
  add_entries(m, kForwards);
  forward_names();
  m.def("keep_regions", keep_regions);
  m.def("known_forwards", known_forwards);
}

}  // namespace mylayers::python
