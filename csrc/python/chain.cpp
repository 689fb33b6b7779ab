// What mylayers._C does of a module as a whole: calls of a FusedSequential and of a layer alone,
// and a step of training. Modules are told apart by plans.h, functions by watched_functions.h.
#include "chain.h"

#include <ATen/TracerMode.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../sequential.h"
#include "../training.h"
#include "arguments.h"
#include "entries.h"
#include "gil.h"
#include "held.h"
#include "known.h"
#include "optimizers.h"
#include "plans.h"
#include "watched_functions.h"

namespace mylayers::python {
namespace {

// ---- what is known of modules ------------------------------------------------------------------

using plans::Found;
using plans::Known;

// Names and objects looked at on every call.
struct Names {
  PyObject* modules = PyUnicode_InternFromString("_modules");
  PyObject* forward = PyUnicode_InternFromString("forward");
  PyObject* iter = PyUnicode_InternFromString("__iter__");
  PyObject* get = PyUnicode_InternFromString("__getattribute__");
  py::object iter_of_sequential =
      py::module_::import("torch.nn").attr("Sequential").attr("__iter__");
  py::object get_of_object =
      py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(&PyBaseObject_Type))
          .attr("__getattribute__");
  // Each (PyTorch's module, name, the dictionary of hooks on all modules that was there at import).
  py::tuple global_hooks;

  Names() {
    const auto module = py::module_::import("torch.nn.modules.module");
    py::list places;
    for (const char* name :
         {"_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
          "_global_backward_pre_hooks"}) {
      places.append(py::make_tuple(module, name, module.attr(name)));
    }
    global_hooks = py::tuple(places);
  }
};

// First asked for when the module is made: who waits for another thread to make a static holds the
// GIL, which an import gives up meanwhile. Outlives the interpreter's own end.
const Names& names() {
  static const Names& once = *new Names();
  return once;
}

// What layers call, what losses and a backward do, and dictionaries of hooks on all modules.
struct Watched {
  WatchedFunctions by_layers, in_training, hooks;
};

// Outlives the interpreter's own end.
Watched& watched() {
  static Watched& once = *new Watched();
  return once;
}

// Each of them (module or class, name, what is there unless somebody has replaced it).
void watch_functions(const py::tuple& by_layers, const py::tuple& in_training) {
  Watched made{
      WatchedFunctions(by_layers), WatchedFunctions(in_training),
      WatchedFunctions(names().global_hooks)};
  std::swap(watched(), made);
}

}  // namespace

bool has_global_hooks() { return has_entries(watched().hooks, names().global_hooks); }

// Which functions that layers call are replaced; 0 if none is, another number for other ones.
uint64_t replaced_functions() { return watched().by_layers.replaced(); }

namespace {

// ---- FusedSequential ---------------------------------------------------------------------------

using plans::Part;
using plans::Plan;

// The _modules of a network that gives its children as nn.Sequential does, whatever else its class
// has; otherwise none.
py::object iterated_modules(PyObject* network) {
  PyTypeObject* cls = Py_TYPE(network);
  const auto own = owned(PyObject_GenericGetDict(network, nullptr));
  PyObject* modules = PyDict_GetItemWithError(own.ptr(), names().modules);
  if (modules == nullptr && PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  const bool iterates = modules != nullptr && PyDict_CheckExact(modules) &&
                        _PyType_Lookup(cls, names().iter) == names().iter_of_sequential.ptr() &&
                        _PyType_Lookup(cls, names().get) == names().get_of_object.ptr() &&
                        _PyType_Lookup(cls, names().modules) == nullptr;
  return iterates ? borrowed(modules) : py::object();
}

bool iterates(const py::object& network) {
  return static_cast<bool>(iterated_modules(network.ptr()));
}

// Whether the parameters of a linear layer are a matrix and, if there is a bias, a vector of the
// matrix' size in the dimension of the units. PyTorch's linear takes others, too: a vector in place
// of the matrix, and any bias that can be broadcast.
bool is_matrix_and_vector(const at::Tensor& weight, const at::Tensor* bias, int64_t of_units) {
  if (weight.is_nested()) {
    return true;
  }
  const auto is_symbolic = [](const at::Tensor& t) {
    return t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  return weight.dim() == 2 &&
         (bias == nullptr || (bias->dim() == 1 && (is_symbolic(weight) || is_symbolic(*bias) ||
                                                   bias->size(0) == weight.size(of_units))));
}

// (a tensor, a tensor or None, 0 or 1), as a child that is planned for has them.
bool takes_parameters(const py::object& weight, const py::object& bias, int64_t of_units) {
  return is_matrix_and_vector(
      THPVariable_Unpack(tensor_argument("plan", "weight", weight.ptr())),
      bias.is_none() ? nullptr : &THPVariable_Unpack(tensor_argument("plan", "bias", bias.ptr())),
      of_units);
}

}  // namespace

// The same of a child that a step of a program with parameters is for. A norm refuses them itself.
bool fits_step(const Step& step, const Found& found) {
  const LinearStep* const linear = step.as_linear();
  return linear == nullptr || found.foreign ||
         is_matrix_and_vector(
             THPVariable_Unpack(found.weight),
             found.bias == nullptr ? nullptr : &THPVariable_Unpack(found.bias),
             linear->transposed ? 0 : 1);
}

namespace {

// The next children of a network, from a place in its _modules on. Into `children`, if given; into
// `parameters`, if given, the tensors of those that have any, which must then be of no class of
// their own. Whether they are what the part was made for.
bool next(
    const Part& part, PyObject* modules, Py_ssize_t& place, Held* parameters,
    std::vector<py::object>* children) {
  bool as_planned = true;
  auto step = part.program.has_value() ? part.program->steps_with_parameters.begin() : nullptr;
  for (const plans::Kind& kind : part.children) {
    PyObject* module = nullptr;
    if (!PyDict_Next(modules, &place, nullptr, &module)) {
      return false;
    }
    const py::object held = borrowed(module);
    Found found;
    as_planned =
        as_planned && fits(kind, module, found) && !(parameters != nullptr && found.foreign);
    if (as_planned && step != nullptr && (found.weight != nullptr || found.foreign)) {
      as_planned = fits_step(**step++, found);
    }
    if (as_planned && parameters != nullptr && found.weight != nullptr) {
      parameters->take(found.weight);
      if (found.bias != nullptr) {
        parameters->take(found.bias);
      }
    }
    if (children != nullptr) {
      children->push_back(held);
    } else if (!as_planned) {
      return false;
    }
  }
  return as_planned;
}

bool all_fit(const Plan& plan, PyObject* modules) {
  Py_ssize_t place = 0;
  for (const Part& part : plan.parts) {
    if (!next(part, modules, place, nullptr, nullptr)) {
      return false;
    }
  }
  return true;
}

// Whether a call of the program is over in a microsecond. Input and parameters.
bool is_short(const Held& tensors, const Program& program) {
  const at::Tensor& x = tensors[0];
  if (!has_plain_sizes(x) || x.numel() > kShortAlone) {
    return false;
  }
  int64_t work_per_row = 0;
  for (const LinearStep* step : program.linear_steps) {
    const at::Tensor& weight = tensors[1 + step->first_parameter];
    work_per_row += has_plain_sizes(weight) ? weight.numel() : kShortAlone;
  }
  const int64_t columns = x.dim() ? x.size(-1) : 1;
  const auto at_most = [&](int64_t work) {
    return work_per_row <= work && x.numel() <= work && x.numel() * work_per_row <= work * columns;
  };
  return at_most(kShort) || at_most(short_now());
}

}  // namespace

PyObject* run_program(const Program& program, Held& tensors) {
  const auto shortcut = shortcut_of(arguments(tensors[0], {tensors.from(1)}));
  return wrapped(is_short(tensors, program), shortcut, tensors, [&] {
    return sequential_by(shortcut, tensors[0], tensors.from(1), program);
  });
}

namespace {

// The next child's result of x.
py::object call_next(const py::object& modules, Py_ssize_t& place, const py::object& x) {
  PyObject* child = nullptr;
  if (!PyDict_Next(modules.ptr(), &place, nullptr, &child)) {
    throw std::runtime_error("dictionary keys changed during iteration");
  }
  const py::object held = borrowed(child);
  return owned(PyObject_CallOneArg(child, x.ptr()));
}

void check_size(const py::object& modules, Py_ssize_t size) {
  if (PyDict_GET_SIZE(modules.ptr()) != size) {
    throw std::runtime_error("dictionary changed size during iteration");
  }
}

// The children one after another, as iterating over them would have it.
py::object run_one_by_one(const py::object& modules, py::object x) {
  const Py_ssize_t siblings = PyDict_GET_SIZE(modules.ptr());
  Py_ssize_t place = 0;
  for (Py_ssize_t i = 0; i < siblings; ++i) {
    x = call_next(modules, place, x);
    check_size(modules, siblings);
  }
  return x;
}

// The parts one after another. A child that runs by itself may do anything to those behind it; they
// are taken when it is their turn, and refused where iterating over them would be.
py::object run_parts(const Plan& plan, const py::object& modules, py::object x) {
  Py_ssize_t place = 0;
  for (const Part& part : plan.parts) {
    check_size(modules, plan.siblings);
    if (!part.program.has_value()) {
      x = call_next(modules, place, x);
      continue;
    }
    const bool same_functions = plan.replaced == replaced_functions();
    if (same_functions && THPVariable_CheckExact(x.ptr()) && !is_watched()) {
      Held tensors;
      tensors.take(x.ptr());
      Py_ssize_t after = place;
      if (next(part, modules.ptr(), after, &tensors, nullptr)) {
        x = owned(run_program(*part.program, tensors));
        place = after;
        continue;
      }
    }
    std::vector<py::object> children;
    const bool same_children = next(part, modules.ptr(), place, nullptr, &children);
    if (children.size() != part.children.size()) {
      throw std::runtime_error("dictionary keys changed during iteration");
    }
    // Something watches, or a child before them has changed these or a function that they call.
    static PyObject* python = nullptr;  // for which no other thread waits, unlike an initializer
    if (python == nullptr) {
      python = py::module_::import("mylayers.sequential").release().ptr();
    }
    py::list given;
    for (const py::object& child : children) {
      given.append(child);
    }
    x = same_children && same_functions
            ? py::handle(python).attr("_run_chain")(given, part.program->text, x)
            : py::handle(python).attr("_run")(given, x);
  }
  check_size(modules, plan.siblings);
  return x;
}

// Children that are given in a way of their own, which may look at what the last one did.
py::object run_iterated(PyObject* network, py::object x) {
  const auto children = owned(PyObject_GetIter(network));
  while (const auto child = py::reinterpret_steal<py::object>(PyIter_Next(children.ptr()))) {
    x = owned(PyObject_CallOneArg(child.ptr(), x.ptr()));
  }
  if (PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  return x;
}

// The plan that a call of a network may follow, straight from its class's __call__; none where one
// would do more. `found` has the _modules of one that comes to the parts. `tensors` are those of a
// plan that is one chain, the input first; none if something watches, or the input is no plain
// tensor.
std::shared_ptr<const Plan> plan_of_call(
    PyObject* network, PyObject* input, Found& found, Held& tensors) {
  if (has_global_hooks() || at::tracer::impl::is_dispatch_enabled()) {
    return nullptr;
  }
  const bool takes = THPVariable_CheckExact(input) && !is_watched();
  const uint64_t replaced = replaced_functions();
  return known_of<Plan>(network, [&](const Plan& plan) {
    found = {};
    tensors.clear();
    if (plan.call == Plan::Call::kOtherwise || !fits(plan.called, network, found) || found.hooks) {
      return false;
    }
    if (plan.call == Plan::Call::kForward || !plan.iterates) {
      return plan.call == Plan::Call::kForward || !iterated_modules(network);
    }
    if (plan.replaced != replaced || !found.modules ||
        PyDict_GET_SIZE(found.modules.ptr()) != plan.siblings) {
      return false;
    }
    if (!takes || !plan.is_one_chain()) {
      return all_fit(plan, found.modules.ptr());
    }
    tensors.take(input);
    Py_ssize_t place = 0;
    return next(plan.parts[0], found.modules.ptr(), place, &tensors, nullptr);
  });
}

// (a FusedSequential, input): a call of it.
PyObject* call_network(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("call_network", count, 2);
  Found found;
  Held tensors;
  const auto plan = plan_of_call(args[0], args[1], found, tensors);
  if (plan == nullptr) {
    return Py_NewRef(refused());
  }
  if (plan->call == Plan::Call::kForward) {
    return PyObject_CallMethodOneArg(args[0], names().forward, args[1]);
  }
  if (plan->is_one_chain() && !tensors.is_empty()) {
    return run_program(*plan->parts[0].program, tensors);
  }
  const auto x = borrowed(args[1]);
  return (plan->iterates ? run_parts(*plan, found.modules, x) : run_iterated(args[0], x))
      .release()
      .ptr();
  END_HANDLE_TH_ERRORS
}

// (a FusedSequential, input): its forward. Refused where nothing is known of its children as they
// are.
PyObject* run_network(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("run_network", count, 2);
  PyObject* network = args[0];
  const auto x = borrowed(args[1]);
  const py::object modules = iterated_modules(network);
  const bool watched_by_hooks = has_global_hooks();
  const uint64_t replaced = replaced_functions();
  const auto plan = known_of<Plan>(network, [&](const Plan& made) {
    Found found;
    if (made.iterates != static_cast<bool>(modules) || !fits(made.network, network, found)) {
      return false;
    }
    return !made.iterates ||
           (made.replaced == replaced && PyDict_GET_SIZE(modules.ptr()) == made.siblings &&
            (watched_by_hooks || all_fit(made, modules.ptr())));
  });
  if (plan == nullptr) {
    return Py_NewRef(refused());
  }
  const auto run = [&] {
    if (!plan->iterates) {
      return run_iterated(network, x);
    }
    return watched_by_hooks ? run_one_by_one(modules, x) : run_parts(*plan, modules, x);
  };
  return run().release().ptr();
  END_HANDLE_TH_ERRORS
}

// The network as its forward depends on it, and as a call does, each (class, its version or 0,
// entries or None), as plans.h has it; what a call then comes to; the replaced_functions that the
// parts hold for; these, each (program or None, its children's kinds), or None where the children
// are given in a way of their own.
void keep_plan(
    const py::object& network, const py::tuple& kind, const py::tuple& called, int call,
    uint64_t replaced, const std::optional<py::tuple>& parts) {
  Plan plan;
  plan.network = plans::kind_of(kind);
  plan.called = plans::kind_of(called);
  plan.call = static_cast<Plan::Call>(call);
  plan.replaced = replaced;
  plan.iterates = parts.has_value();
  for (const py::handle item : parts.value_or(py::tuple())) {
    const auto given = item.cast<py::tuple>();
    Part part;
    if (const py::object program = given[0]; !program.is_none()) {
      part.program.emplace(program.cast<std::string>());
    }
    for (const py::handle child : py::reinterpret_borrow<py::tuple>(given[1])) {
      part.children.push_back(plans::kind_of(child));
      ++plan.siblings;
    }
    plan.parts.push_back(std::move(part));
  }
  known<Plan>().keep(network, std::move(plan));
}

// ---- a layer alone -----------------------------------------------------------------------------

// What is known of a MyLinear as it is.
std::shared_ptr<const plans::Layer> known_layer(PyObject* layer, Found& found) {
  return known_of<plans::Layer>(layer, [&](const plans::Layer& state) {
    found = {};
    return fits(state.kind, layer, found);
  });
}

// Refused where it must look its parameters up.
PyObject* run_known(const plans::Layer& layer, const Found& found, PyObject* input) {
  if (!layer.is_stock || found.weight == nullptr || !THPVariable_CheckExact(input) ||
      is_watched() || replaced_functions() != 0) {
    return Py_NewRef(refused());
  }
  Held tensors;
  tensors.take(input);
  tensors.take(found.weight);
  if (found.bias != nullptr) {
    tensors.take(found.bias);
  }
  return run_linear_act(tensors, found.bias != nullptr, layer.activation);
}

// (a MyLinear, input): a call of it. Refused where one would do more than its forward.
PyObject* call_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("call_layer", count, 2);
  if (has_global_hooks()) {
    return Py_NewRef(refused());
  }
  Found found;
  const auto layer = known_layer(args[0], found);
  return layer == nullptr || found.hooks ? Py_NewRef(refused()) : run_known(*layer, found, args[1]);
  END_HANDLE_TH_ERRORS
}

// (a MyLinear, input): its forward. None where nothing is known of it as it is.
PyObject* run_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("run_layer", count, 2);
  Found found;
  const auto layer = known_layer(args[0], found);
  return layer == nullptr ? Py_NewRef(Py_None) : run_known(*layer, found, args[1]);
  END_HANDLE_TH_ERRORS
}

void keep_layer(
    const py::object& layer, const py::tuple& kind, bool is_stock,
    const std::optional<std::string>& activation) {
  known<plans::Layer>().keep(layer, {plans::kind_of(kind), is_stock, parse_activation(activation)});
}

// ---- training ----------------------------------------------------------------------------------

Criterion criterion_of(const py::tuple& given) {
  return {
      static_cast<Criterion::Kind>(given[0].cast<int64_t>()), given[1].cast<int64_t>(),
      given[2].cast<double>(), given[3].cast<int64_t>()};
}

// The loss, its gradients added to the parameters'; none, and nothing done, where a graph is
// needed.
py::object loss_and_gradients(
    PyObject* network, const Criterion& criterion, PyObject* input, PyObject* target) {
  Found found;
  Held tensors;
  const auto plan = plan_of_call(network, input, found, tensors);
  if (plan == nullptr || !plan->is_one_chain() || tensors.is_empty() ||
      watched().in_training.replaced() != 0 || !THPVariable_CheckExact(target)) {
    return py::none();
  }
  const Program& program = *plan->parts[0].program;
  const bool keeps_gil = is_short(tensors, program);
  Held wanted;
  wanted.take(target);
  if (!keeps_gil) {
    tensors.own();
    wanted.own();
  }
  return owned(wrapped(keeps_gil, [&] {
    return mylayers::forward_backward(tensors[0], tensors.from(1), program, criterion, wanted[0]);
  }));
}

// The same for a criterion that is called, and may do anything.
py::object loss_of_call(PyObject* network, PyObject* criterion, PyObject* input, PyObject* target) {
  Found found;
  Held tensors;
  const auto plan = plan_of_call(network, input, found, tensors);
  if (plan == nullptr || !plan->is_one_chain() || tensors.is_empty()) {
    return py::none();
  }
  auto output = owned(run_program(*plan->parts[0].program, tensors));
  tensors.clear();
  const auto node = torch::autograd::impl::gradient_edge(THPVariable_Unpack(output.ptr()));
  const auto loss = owned(PyObject_CallFunctionObjArgs(criterion, output.ptr(), target, nullptr));
  output = {};
  const auto is_done = [&] {
    if (!THPVariable_CheckExact(loss.ptr()) || is_watched() ||
        watched().in_training.replaced() != 0) {
      return false;
    }
    const at::Tensor& value = THPVariable_Unpack(loss.ptr());
    const py::gil_scoped_release hooks_take_it;
    return mylayers::backward_to(node, value);
  };
  if (!is_done()) {
    loss.attr("backward")();
  }
  return loss.attr("detach")();
}

// What is known of a loss, as it is.
std::shared_ptr<const plans::Loss> known_loss(PyObject* criterion) {
  Found found;
  return known_of<plans::Loss>(criterion, [&](const plans::Loss& state) {
    found = {};
    return fits(state.kind, criterion, found);
  });
}

// (a FusedSequential, a loss, input, target): the loss, its gradients added to the parameters';
// refused, and nothing done, where the network must be called; None where nothing is known of the
// loss.
PyObject* forward_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("forward_backward", count, 4);
  const auto loss = known_loss(args[1]);
  if (loss == nullptr) {
    return Py_NewRef(Py_None);
  }
  py::object value = py::none();
  if (loss->criterion.has_value()) {
    value = loss_and_gradients(args[0], *loss->criterion, args[2], args[3]);
  }
  if (value.is_none()) {
    value = loss_of_call(args[0], args[1], args[2], args[3]);
  }
  return value.is_none() ? Py_NewRef(refused()) : value.release().ptr();
  END_HANDLE_TH_ERRORS
}

// The same of a loss of which nothing can be known.
PyObject* forward_backward_of_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("forward_backward_of_call", count, 4);
  auto value = loss_of_call(args[0], args[1], args[2], args[3]);
  return value.is_none() ? Py_NewRef(refused()) : value.release().ptr();
  END_HANDLE_TH_ERRORS
}

// (a FusedSequential, a loss, optimizer, input, target): the loss, after zero_grad,
// forward_backward and the optimiser's step; in a tuple if the step remains to be made; refused
// where all does, and the gradients may be gone; None where nothing is known of the loss or the
// optimiser.
PyObject* training_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("training_step", count, 5);
  const auto loss = known_loss(args[1]);
  if (loss != nullptr && !loss->criterion.has_value()) {
    return Py_NewRef(refused());
  }
  const auto zeroed = loss == nullptr ? Answer::kUnknown : optimizer_zero_grad(args[2], true);
  if (zeroed != Answer::kDone) {
    return Py_NewRef(zeroed == Answer::kUnknown ? Py_None : refused());
  }
  auto value = loss_and_gradients(args[0], *loss->criterion, args[3], args[4]);
  if (value.is_none()) {
    return Py_NewRef(refused());
  }
  if (optimizer_step(args[2]) != Answer::kDone) {
    return py::make_tuple(std::move(value)).release().ptr();
  }
  return value.release().ptr();
  END_HANDLE_TH_ERRORS
}

// None for a criterion that must be called.
void keep_loss(
    const py::object& loss, const py::tuple& kind, const std::optional<py::tuple>& criterion) {
  plans::Loss known_as = {plans::kind_of(kind), std::nullopt};
  if (criterion.has_value()) {
    known_as.criterion = criterion_of(*criterion);
  }
  known<plans::Loss>().keep(loss, std::move(known_as));
}

// CPython's number for the present state of a class; 0 if it has given it none.
unsigned class_version(const py::type& cls) {
  return plans::fresh_version(reinterpret_cast<PyTypeObject*>(cls.ptr()), names().forward);
}

// How many objects something is known of.
size_t known_objects() {
  return known<Plan>().size() + known<plans::Layer>().size() + known<plans::Loss>().size();
}

PyMethodDef kEntries[] = {
    entry("call_network", call_network, "call_network(network, input)"),
    entry("run_network", run_network, "run_network(network, input)"),
    entry("call_layer", call_layer, "call_layer(layer, input)"),
    entry("run_layer", run_layer, "run_layer(layer, input)"),
    entry("forward_backward", forward_backward, "forward_backward(network, loss, input, target)"),
    entry(
        "forward_backward_of_call", forward_backward_of_call,
        "forward_backward_of_call(network, loss, input, target)"),
    entry("training_step", training_step, "training_step(network, loss, optimizer, input, target)"),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_chain(py::module_& m) {
  add_entries(m, kEntries);
  names();
  m.attr("REFUSED") = borrowed(refused());
  m.def("watch_functions", watch_functions);
  m.def(
      "takes_parameters",
      py::overload_cast<const py::object&, const py::object&, int64_t>(takes_parameters));
  m.def("replaced_functions", replaced_functions);
  m.def("iterates", iterates);
  m.def("keep_plan", keep_plan);
  m.def("keep_layer", keep_layer);
  m.def("keep_loss", keep_loss);
  m.def("class_version", class_version);
  m.def("known_objects", known_objects);
}

}  // namespace mylayers::python
