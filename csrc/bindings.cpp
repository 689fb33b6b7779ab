// The Python module mylayers._C: entries for eager calls of the operators, and facts
// about this build. With plans.h and watched_functions.h the only file that includes Python
// headers; a program without Python links the others.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/Exceptions.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "center.h"
#include "cpu/gemm_aten.h"
#include "cpu/huge_pages.h"
#include "cpu/machine/tuning.h"
#include "linear_act.h"
#include "plans.h"
#include "sequential.h"
#include "training.h"
#include "watched_functions.h"

namespace py = pybind11;
namespace plans = mylayers::plans;

namespace {

// The operators' entries take their arguments by position through CPython's own calling
// convention: pybind11's, with its argument records, costs a fifth of a small call.

PyObject* tensor_argument(const char* op, const char* name, PyObject* value) {
  TORCH_CHECK_TYPE(
      THPVariable_Check(value), op, ": ", name, " must be a torch.Tensor; got ",
      Py_TYPE(value)->tp_name);
  return value;
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

// The same where no other thread is there to take it.
constexpr int64_t kShortAlone = 1 << 19;

int64_t short_now() {
  PyThreadState* const here = PyThreadState_Get();
  const bool alone = PyInterpreterState_ThreadHead(PyThreadState_GetInterpreter(here)) == here &&
                     PyThreadState_Next(here) == nullptr;
  return alone ? kShortAlone : kShort;
}

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

py::object borrowed(PyObject* object) { return py::reinterpret_borrow<py::object>(object); }

py::object owned(PyObject* object) {
  if (object == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(object);
}

// Tensors held through their Python objects, whose count needs no lock: a count of a tensor that
// Python knows takes the GIL each time, 50 ns. That is enough while no other thread can run, which
// might exchange the tensor of such an object (torch.utils.swap_tensors); before that, `own`.
class Held {
 public:
  Held() = default;
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { clear(); }

  void clear() {
    if (!owned_) {
      for (at::Tensor& t : tensors_) {
        Borrow::destroyBorrow(t);
      }
    }
    tensors_.clear();
    objects_.clear();
    owned_ = false;
  }
  bool is_empty() const { return tensors_.empty(); }
  void take(PyObject* tensor) {
    objects_.push_back(borrowed(tensor));
    tensors_.push_back(Borrow::createBorrow(THPVariable_Unpack(tensor)));
  }
  void own() {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      at::Tensor tensor = THPVariable_Unpack(objects_[i].ptr());
      Borrow::destroyBorrow(tensors_[i]);
      tensors_[i] = std::move(tensor);
    }
    owned_ = true;
  }
  const at::Tensor& operator[](size_t i) const { return tensors_[i]; }
  // All but the first `count`.
  at::TensorList from(size_t count) const { return at::TensorList(tensors_).slice(count); }

 private:
  using Borrow = c10::MaybeOwnedTraits<at::Tensor>;
  c10::SmallVector<py::object, 16> objects_;
  c10::SmallVector<at::Tensor, 16> tensors_;
  bool owned_ = false;
};

// act(x @ w + b) of input, weight and, if it has one, bias.
PyObject* run_linear_act(Held& tensors, bool has_bias, mylayers::ActivationName activation) {
  const at::Tensor &x = tensors[0], &w = tensors[1];
  const auto at_most = [&](int64_t work) {
    return w.size(1) <= work && x.numel() * w.size(1) <= work;
  };
  const bool keeps_gil = has_plain_sizes(x) && has_plain_sizes(w) && w.dim() == 2 &&
                         (at_most(kShort) || at_most(short_now()));
  if (!keeps_gil || at::GradMode::is_enabled()) {
    tensors.own();
  }
  mylayers::OptionalTensor b;
  if (has_bias) {
    b = tensors[2];
  }
  return wrapped(keeps_gil, [&] { return mylayers::linear_act(x, w, b, activation); });
}

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
  mylayers::ActivationName act;
  const py::object owner_of_its_text = borrowed(args[3]);
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
  return run_linear_act(tensors, args[2] != Py_None, act);
  END_HANDLE_TH_ERRORS
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
  const bool keeps_gil = has_plain_sizes(x) && x.numel() <= kShort;
  if (!keeps_gil || at::GradMode::is_enabled()) {
    tensors.own();
  }
  return wrapped(keeps_gil, [&] { return mylayers::center(x, list); });
  END_HANDLE_TH_ERRORS
}

// ---- what is known of modules ------------------------------------------------------------------

using plans::Found;
using plans::Known;

// Outlives the interpreter's own end.
template <class T>
Known<T>& known() {
  static auto& once = *new Known<T>();
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
PyObject* refused() {
  static PyObject* const once =
      PyObject_CallNoArgs(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  return once;
}

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
  py::object global_hooks[4];

  Names() {
    const auto module = py::module_::import("torch.nn.modules.module");
    const char* const names[4] = {
        "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
        "_global_backward_pre_hooks"};
    for (int i = 0; i < 4; ++i) {
      global_hooks[i] = module.attr(names[i]);
    }
  }
};

// First asked for when the module is made: who waits for another thread to make a static holds the
// GIL, which an import gives up meanwhile. Outlives the interpreter's own end.
const Names& names() {
  static const Names& once = *new Names();
  return once;
}

bool has_global_hooks() {
  for (const py::object& hooks : names().global_hooks) {
    if (PyDict_GET_SIZE(hooks.ptr()) != 0) {
      return true;
    }
  }
  return false;
}

// Whether something watches calls by their Python name.
bool is_watched() {
  return at::impl::torch_function_mode_enabled() || at::tracer::impl::is_dispatch_enabled();
}

// What layers call, and what losses and a backward do.
struct Watched {
  mylayers::WatchedFunctions by_layers, in_training;
};

// Outlives the interpreter's own end.
Watched& watched() {
  static Watched& once = *new Watched();
  return once;
}

// Each of them (module or class, name, what is there unless somebody has replaced it).
void watch_functions(const py::tuple& by_layers, const py::tuple& in_training) {
  Watched made{mylayers::WatchedFunctions(by_layers), mylayers::WatchedFunctions(in_training)};
  std::swap(watched(), made);
}

// Which functions that layers call are replaced; 0 if none is, another number for other ones.
uint64_t replaced_functions() { return watched().by_layers.replaced(); }

// ---- FusedSequential ---------------------------------------------------------------------------

using plans::Part;
using plans::Plan;

// Whether the class, whatever else it has, gives its children as nn.Sequential does.
bool iterates(PyTypeObject* cls) {
  return _PyType_Lookup(cls, names().iter) == names().iter_of_sequential.ptr() &&
         _PyType_Lookup(cls, names().get) == names().get_of_object.ptr() &&
         _PyType_Lookup(cls, names().modules) == nullptr;
}

// The next children of a network, from a place in its _modules on. Into `children`, if given; into
// `parameters`, if given, the tensors of those that are linear, which must then be of no class of
// their own. Whether they are what the part was made for.
bool next(
    const Part& part, PyObject* modules, Py_ssize_t& place, Held* parameters,
    std::vector<py::object>* children) {
  bool as_planned = true;
  for (const plans::Kind& kind : part.children) {
    PyObject* module = nullptr;
    if (!PyDict_Next(modules, &place, nullptr, &module)) {
      return false;
    }
    const py::object held = borrowed(module);
    Found found;
    as_planned =
        as_planned && fits(kind, module, found) && !(parameters != nullptr && found.foreign);
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
bool is_short(const Held& tensors, const mylayers::Program& program) {
  const at::Tensor& x = tensors[0];
  if (!has_plain_sizes(x) || x.numel() > kShortAlone) {
    return false;
  }
  int64_t work_per_row = 0;
  size_t parameter = 1;
  for (const mylayers::Step& step : program.steps) {
    if (step.kind == mylayers::Step::Kind::kLinear) {
      const at::Tensor& weight = tensors[parameter];
      work_per_row += has_plain_sizes(weight) ? weight.numel() : kShortAlone;
      parameter += step.parameters();
    }
  }
  const int64_t columns = x.dim() ? x.size(-1) : 1;
  const auto at_most = [&](int64_t work) {
    return work_per_row <= work && x.numel() <= work && x.numel() * work_per_row <= work * columns;
  };
  return at_most(kShort) || at_most(short_now());
}

PyObject* run_program(const mylayers::Program& program, Held& tensors) {
  const bool keeps_gil = is_short(tensors, program);
  if (!keeps_gil || at::GradMode::is_enabled()) {
    tensors.own();  // saving a tensor for backward may run Python code
  }
  return wrapped(
      keeps_gil, [&] { return mylayers::sequential(tensors[0], tensors.from(1), program); });
}

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

// The plan that a call of a network may follow, straight from its class's __call__; none where one
// would do more than the parts. `found` has its _modules. `tensors` are those of a plan that is one
// chain, the input first; none if something watches, or the input is no plain tensor.
std::shared_ptr<const Plan> plan_of_call(
    PyObject* network, PyObject* input, Found& found, Held& tensors) {
  if (has_global_hooks() || at::tracer::impl::is_dispatch_enabled()) {
    return nullptr;
  }
  const bool takes = THPVariable_CheckExact(input) && !is_watched();
  const uint64_t replaced = replaced_functions();
  return known_of<Plan>(network, [&](const Plan& plan) {
    found = {};
    if (!plan.is_direct || plan.replaced != replaced || !fits(plan.network, network, found) ||
        found.hooks || !found.modules || PyDict_GET_SIZE(found.modules.ptr()) != plan.siblings) {
      return false;
    }
    if (!takes || !plan.is_one_chain()) {
      return all_fit(plan, found.modules.ptr());
    }
    tensors.clear();
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
  return plan->is_one_chain() && !tensors.is_empty()
             ? run_program(*plan->parts[0].program, tensors)
             : run_parts(*plan, found.modules, borrowed(args[1])).release().ptr();
  END_HANDLE_TH_ERRORS
}

// (a FusedSequential, input): its forward. Refused where nothing is known of its children as they
// are.
PyObject* run_network(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("run_network", count, 2);
  PyObject* network = args[0];
  const py::object own = owned(PyObject_GenericGetDict(network, nullptr));
  PyObject* given = PyDict_GetItemWithError(own.ptr(), names().modules);
  if (given == nullptr) {
    if (PyErr_Occurred() != nullptr) {
      throw py::error_already_set();
    }
    return Py_NewRef(refused());
  }
  const py::object modules = borrowed(given);
  if (!PyDict_CheckExact(given)) {
    return Py_NewRef(refused());
  }
  const bool watched_by_hooks = has_global_hooks();
  const uint64_t replaced = replaced_functions();
  const auto plan = known_of<Plan>(network, [&](const Plan& made) {
    Found found;
    return made.replaced == replaced && fits(made.network, network, found) &&
           (made.network.has_state || iterates(Py_TYPE(network))) &&
           PyDict_GET_SIZE(modules.ptr()) == made.siblings &&
           (watched_by_hooks || all_fit(made, modules.ptr()));
  });
  if (plan == nullptr) {
    return Py_NewRef(refused());
  }
  const auto x = borrowed(args[1]);
  return (watched_by_hooks ? run_one_by_one(modules, x) : run_parts(*plan, modules, x))
      .release()
      .ptr();
  END_HANDLE_TH_ERRORS
}

// (class, its version or 0, entries or None), as csrc/plans.h has it; the replaced_functions that
// it holds for; whether a call may go straight to the parts; the parts, each (program or None, its
// children's kinds).
void keep_plan(
    const py::object& network, const py::tuple& kind, uint64_t replaced, bool is_direct,
    const py::tuple& parts) {
  Plan plan;
  plan.network = plans::kind_of(kind);
  plan.replaced = replaced;
  plan.is_direct = is_direct;
  for (const py::handle item : parts) {
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

// (a MyLinear, input): its forward. None where nothing is known of it as it is.
PyObject* run_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("run_layer", count, 2);
  Found found;
  const auto layer = known_of<plans::Layer>(args[0], [&](const plans::Layer& state) {
    found = {};
    return fits(state.kind, args[0], found);
  });
  if (layer == nullptr) {
    return Py_NewRef(Py_None);
  }
  if (!layer->is_stock || found.weight == nullptr || !THPVariable_CheckExact(args[1]) ||
      is_watched() || replaced_functions() != 0) {
    return Py_NewRef(refused());
  }
  Held tensors;
  tensors.take(args[1]);
  tensors.take(found.weight);
  if (found.bias != nullptr) {
    tensors.take(found.bias);
  }
  return run_linear_act(tensors, found.bias != nullptr, layer->activation);
  END_HANDLE_TH_ERRORS
}

void keep_layer(
    const py::object& layer, const py::tuple& kind, bool is_stock,
    std::optional<std::string> activation) {
  known<plans::Layer>().keep(layer, {plans::kind_of(kind), is_stock, std::move(activation)});
}

// ---- training ----------------------------------------------------------------------------------

mylayers::Criterion criterion_of(const py::tuple& given) {
  return {
      static_cast<mylayers::Criterion::Kind>(given[0].cast<int64_t>()), given[1].cast<int64_t>(),
      given[2].cast<double>(), given[3].cast<int64_t>()};
}

// (a FusedSequential, a loss, input, target): the loss, its gradients added to the parameters';
// refused, and nothing done, where a graph is needed; None where nothing is known of the loss.
PyObject* forward_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("forward_backward", count, 4);
  Found found;
  const auto loss = known_of<plans::Loss>(
      args[1], [&](const plans::Loss& state) { return fits(state.kind, args[1], found); });
  if (loss == nullptr) {
    return Py_NewRef(Py_None);
  }
  Held tensors;
  const auto plan = plan_of_call(args[0], args[2], found, tensors);
  if (plan == nullptr || !plan->is_one_chain() || tensors.is_empty() ||
      watched().in_training.replaced() != 0 || !THPVariable_CheckExact(args[3])) {
    return Py_NewRef(refused());
  }
  const mylayers::Program& program = *plan->parts[0].program;
  const bool keeps_gil = is_short(tensors, program);
  const at::Tensor target = THPVariable_Unpack(args[3]);
  if (!keeps_gil) {
    tensors.own();
  }
  const auto value = owned(wrapped(keeps_gil, [&] {
    return mylayers::forward_backward(
        tensors[0], tensors.from(1), program, loss->criterion, target);
  }));
  return value.is_none() ? Py_NewRef(refused()) : value.inc_ref().ptr();
  END_HANDLE_TH_ERRORS
}

void keep_loss(const py::object& loss, const py::tuple& kind, const py::tuple& criterion) {
  known<plans::Loss>().keep(loss, {plans::kind_of(kind), criterion_of(criterion)});
}

// CPython's number for the present state of a class; 0 if it has given it none.
unsigned class_version(const py::type& cls) {
  return plans::fresh_version(reinterpret_cast<PyTypeObject*>(cls.ptr()), names().forward);
}

// How many objects something is known of.
size_t known_objects() {
  return known<Plan>().size() + known<plans::Layer>().size() + known<plans::Loss>().size();
}

PyMethodDef kOperators[] = {
    {"linear_act", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_act)),
     METH_FASTCALL, "linear_act(input, weight, bias, activation)"},
    {"center", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(center)), METH_FASTCALL,
     "center(input, dim)"},
    {"call_network", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_network)),
     METH_FASTCALL, "call_network(network, input)"},
    {"run_network", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run_network)),
     METH_FASTCALL, "run_network(network, input)"},
    {"run_layer", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run_layer)),
     METH_FASTCALL, "run_layer(layer, input)"},
    {"forward_backward",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward_backward)), METH_FASTCALL,
     "forward_backward(network, loss, input, target)"},
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
#elif defined(__aarch64__)
  info["instruction_sets"] = py::make_tuple("neon");
#else
  info["instruction_sets"] = py::make_tuple("generic");
#endif
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(MYLAYERS_CUDA_VERSION)
  info["cuda"] = MYLAYERS_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["cuda_detail"] = MYLAYERS_CUDA_DETAIL;
  info["kernels"] = mylayers::cpu::kernels().name;
  const auto& machine = mylayers::cpu::machine();
  info["tuned_for"] = machine.measured ? machine.name : nullptr;
  info["products"] = mylayers::cpu::has_aten_products() ? "torch" : "own";
  info["amx"] = machine.bf16 == mylayers::cpu::Bf16Units::kAmx;
  info["bfloat16_units"] = machine.bf16 != mylayers::cpu::Bf16Units::kNone;
  info["huge_pages"] = mylayers::cpu::wants_huge_pages();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  mylayers::cpu::has_aten_products();  // throws where the environment makes no sense
  m.doc() = "Compiled half of mylayers; use mylayers.functional and mylayers.MyLinear.";
  if (PyModule_AddFunctions(m.ptr(), kOperators) != 0) {
    throw py::error_already_set();
  }
  names();
  m.attr("REFUSED") = borrowed(refused());
  m.def("watch_functions", watch_functions);
  m.def("replaced_functions", replaced_functions);
  m.def("keep_plan", keep_plan);
  m.def("keep_layer", keep_layer);
  m.def("keep_loss", keep_loss);
  m.def("class_version", class_version);
  m.def("known_objects", known_objects);
  m.def("build_info", build_info);
}
