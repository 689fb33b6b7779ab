// step() and zero_grad() of PyTorch's optimisers. mylayers/optimizers.py decides which optimisers;
// here all that a step would read is looked at before anything is written, without running Python
// code, and what is not as the stock classes leave it is refused.
#include "optimizers.h"

#include <ATen/core/grad_mode.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "../dispatch/questions.h"
#include "../optimizers.h"
#include "arguments.h"
#include "gil.h"
#include "held.h"
#include "known.h"

namespace mylayers::python {
namespace {

// As mylayers/optimizers.py numbers them.
enum class Method { kSgd, kAdam, kRmsprop, kAdagrad };

struct Optimizer {
  plans::Kind kind;
  Method method;
  mutable std::vector<size_t> order;  // of the memory that its last step touched
};

struct OptimizerNames {
#define NAME(name) PyObject* name = PyUnicode_InternFromString(#name)
  NAME(state);
  NAME(param_groups);
  NAME(defaults);
  NAME(params);
  NAME(lr);
  NAME(momentum);
  NAME(dampening);
  NAME(nesterov);
  NAME(weight_decay);
  NAME(decoupled_weight_decay);
  NAME(maximize);
  NAME(betas);
  NAME(eps);
  NAME(amsgrad);
  NAME(alpha);
  NAME(centered);
  NAME(lr_decay);
  NAME(foreach);
  NAME(fused);
  NAME(capturable);
  NAME(differentiable);
  NAME(step);
  NAME(momentum_buffer);
  NAME(exp_avg);
  NAME(exp_avg_sq);
  NAME(max_exp_avg_sq);
  NAME(square_avg);
  NAME(grad_avg);
  NAME(sum);
#undef NAME
  py::object defaultdict = py::module_::import("collections").attr("defaultdict");
};

// Made with the module. Outlives the interpreter's own end.
const OptimizerNames& optimizer_names() {
  static const OptimizerNames& once = *new OptimizerNames();
  return once;
}

// What a step calls, and dictionaries of hooks on all optimisers.
struct WatchedByOptimizers {
  WatchedFunctions functions, hooks;
  py::tuple places_of_hooks;
};

WatchedByOptimizers& watched_by_optimizers() {
  static WatchedByOptimizers& once = *new WatchedByOptimizers();
  return once;
}

// Each of `functions` (module or class, name, what is there unless somebody has replaced it), of
// `hooks` (module, name, dictionary).
void watch_optimizers(const py::tuple& functions, const py::tuple& hooks) {
  WatchedByOptimizers made{WatchedFunctions(functions), WatchedFunctions(hooks), hooks};
  std::swap(watched_by_optimizers(), made);
}

// ---- what a step reads -------------------------------------------------------------------------

PyObject* item(PyObject* dictionary, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(dictionary, name);
  if (found == nullptr) {
    PyErr_Clear();
  }
  return found;
}

bool is_off(PyObject* option) { return option == Py_None || option == Py_False; }

// The options of a group of parameters. `fits` turns false where one is of another type than the
// stock classes' own, or no number that ATen takes.
class Options {
 public:
  explicit Options(PyObject* group) : group_(group) {}

  double number(PyObject* name) { return number_of(item(group_, name)); }
  double number_of(PyObject* value) {
    if (value != nullptr && PyFloat_CheckExact(value)) {
      return PyFloat_AS_DOUBLE(value);
    }
    // Products of integers are exact in Python: here too, if they are this small.
    constexpr int64_t kSmall = 1 << 26;
    int overflow = 1;
    const int64_t integer = value != nullptr && PyLong_CheckExact(value)
                                ? PyLong_AsLongLongAndOverflow(value, &overflow)
                                : 0;
    fits = fits && overflow == 0 && -kSmall <= integer && integer <= kSmall;
    return static_cast<double>(integer);
  }
  bool flag(PyObject* name) {
    PyObject* value = item(group_, name);
    fits = fits && (value == Py_True || value == Py_False);
    return value == Py_True;
  }
  void must_be_off(PyObject* name) {
    PyObject* value = item(group_, name);
    fits = fits && value != nullptr && is_off(value);
  }
  std::pair<double, double> betas() {
    PyObject* both = item(group_, optimizer_names().betas);
    if (both == nullptr || !PyTuple_CheckExact(both) || PyTuple_GET_SIZE(both) != 2) {
      fits = false;
      return {};
    }
    return {number_of(PyTuple_GET_ITEM(both, 0)), number_of(PyTuple_GET_ITEM(both, 1))};
  }
  GradientRule gradient() {
    return {flag(optimizer_names().maximize), number(optimizer_names().weight_decay)};
  }

  bool fits = true;

 private:
  PyObject* group_;
};

// Whether ATen takes the numbers of this dtype.
bool takes(at::ScalarType dtype, std::initializer_list<double> numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [&](double x) {
    return std::isfinite(x) && (dtype == at::kDouble || std::abs(x) <= FLT_MAX);
  });
}

// The Python object of a tensor, if it has one.
template <class Slot>
PyObject* object_of(const Slot* slot) {
  if constexpr (requires { slot->load_pyobj(); }) {
    return slot->load_pyobj();
  } else {
    return slot->_unchecked_untagged_pyobj();
  }
}

bool has_plain_object(const at::Tensor& t) {
  PyObject* object = object_of(t.unsafeGetTensorImpl()->pyobj_slot());
  return object == nullptr || THPVariable_CheckExact(object);
}

// The stock classes' state of a parameter: a dictionary of plain tensors. `dictionary` may be null.
const at::Tensor* tensor_in(PyObject* dictionary, PyObject* name) {
  PyObject* found = dictionary == nullptr ? nullptr : item(dictionary, name);
  return found != nullptr && THPVariable_CheckExact(found) ? &THPVariable_Unpack(found) : nullptr;
}

// By its address, which is what torch.Tensor's __hash__ tells; to call that would run Python code.
PyObject* state_of(PyObject* states, PyObject* parameter) {
  PyObject* found = _PyDict_GetItem_KnownHash(
      states, parameter, static_cast<Py_hash_t>(reinterpret_cast<intptr_t>(parameter)));
  if (found == nullptr) {
    PyErr_Clear();
  }
  return found != nullptr && PyDict_CheckExact(found) ? found : nullptr;
}

// ---- a step ------------------------------------------------------------------------------------

// What a step changes, found and checked before anything is changed. Borrows all tensors.
class Step {
 public:
  // Whether this is all that the stock classes' step does.
  bool find(const Optimizer& optimizer, PyObject* own) {
    const OptimizerNames& n = optimizer_names();
    PyObject *groups = item(own, n.param_groups), *defaults = item(own, n.defaults);
    states_ = item(own, n.state);
    if (groups == nullptr || !PyList_CheckExact(groups) || states_ == nullptr ||
        reinterpret_cast<PyObject*>(Py_TYPE(states_)) != n.defaultdict.ptr() ||
        defaults == nullptr || !PyDict_CheckExact(defaults) ||
        item(defaults, n.differentiable) != Py_False) {
      return false;
    }
    for (const auto i : c10::irange(PyList_GET_SIZE(groups))) {
      PyObject* group = PyList_GET_ITEM(groups, i);
      if (!PyDict_CheckExact(group) || !find_group(optimizer.method, group)) {
        return false;
      }
    }
    const at::NoGradGuard as_in_a_step;
    return tensors_.empty() || (leads_to_cpu_kernel(tensors_) && are_apart(optimizer.order));
  }

  void run() {
    int64_t elements = 0;
    for (const auto* updates : {&floats_, &doubles_}) {
      for (const Update& u : *updates) {
        elements += u.count;
      }
    }
    if (elements <= kShort || elements <= short_now()) {
      run_all();
      return;
    }
    std::vector<at::Tensor> owned;
    owned.reserve(tensors_.size());
    for (const at::Tensor* t : tensors_) {
      owned.push_back(*t);
    }
    const py::gil_scoped_release other_threads_may_run;
    run_all();
  }

 private:
  bool find_group(Method method, PyObject* group) {
    const OptimizerNames& n = optimizer_names();
    Options options(group);
    options.must_be_off(n.foreach);
    if (method == Method::kAdam || method == Method::kRmsprop) {
      options.must_be_off(n.capturable);
    }
    if (method != Method::kRmsprop) {
      options.must_be_off(n.fused);
    }
    options.must_be_off(n.differentiable);
    PyObject* parameters = item(group, n.params);
    if (!options.fits || parameters == nullptr || !PyList_CheckExact(parameters)) {
      return false;
    }
    switch (method) {
      case Method::kSgd:
        return find_sgd(options, parameters);
      case Method::kAdam:
        return find_adam(options, parameters);
      case Method::kRmsprop:
        return find_rmsprop(options, parameters);
      case Method::kAdagrad:
        return find_adagrad(options, parameters);
    }
    return false;
  }

  bool find_sgd(Options& options, PyObject* parameters) {
    const OptimizerNames& n = optimizer_names();
    const double lr = options.number(n.lr);
    const SgdRule rule = {
        options.gradient(), options.flag(n.nesterov), options.number(n.momentum),
        1 - options.number(n.dampening), -lr};
    const std::initializer_list<double> numbers = {
        rule.gradient.weight_decay, rule.momentum, rule.gain, rule.rate};
    return options.fits &&
           for_parameters(parameters, numbers, [&](const at::Tensor& p, Update& u, PyObject* s) {
             u.rule = rule;
             return writes(p, 1) &&
                    (rule.momentum == 0 || has_state(p, s, n.momentum_buffer, 2, u.state[0]));
           });
  }

  bool find_adam(Options& options, PyObject* parameters) {
    const OptimizerNames& n = optimizer_names();
    const double lr = options.number(n.lr);
    const auto [beta1, beta2] = options.betas();
    AdamRule rule = {};
    rule.gradient = options.gradient();
    rule.epsilon = options.number(n.eps);
    rule.mean_gain = 1 - beta1;
    rule.beta2 = beta2;
    rule.gain = 1 - beta2;
    if (options.flag(n.decoupled_weight_decay)) {
      rule.shrinks = rule.gradient.weight_decay != 0;
      rule.shrink = 1 - lr * rule.gradient.weight_decay;
      rule.gradient.weight_decay = 0;
    }
    const bool amsgrad = options.flag(n.amsgrad);
    const auto is_beta = [](double b) { return 0 <= b && b < 1; };
    if (!options.fits || !is_beta(beta1) || !is_beta(beta2)) {
      return false;
    }
    double last = 0;
    const std::initializer_list<double> numbers = {
        rule.gradient.weight_decay, rule.shrink, rule.epsilon, lr};
    return for_parameters(parameters, numbers, [&](const at::Tensor& p, Update& u, PyObject* s) {
      const double step = next_step(s);
      if (step != last && step >= 1) {
        // As Python computes them.
        rule.rate = -(lr / (1 - std::pow(beta1, step)));
        rule.root = std::pow(1 - std::pow(beta2, step), 0.5);
        last = step;
      }
      u.rule = rule;
      return step >= 1 && takes(p.scalar_type(), {rule.rate, rule.root}) &&
             writes(p, 1 + rule.shrinks) && has_state(p, s, n.exp_avg, 1, u.state[0]) &&
             has_state(p, s, n.exp_avg_sq, 2, u.state[1]) &&
             (!amsgrad || has_state(p, s, n.max_exp_avg_sq, 1, u.state[2]));
    });
  }

  bool find_rmsprop(Options& options, PyObject* parameters) {
    const OptimizerNames& n = optimizer_names();
    const double lr = options.number(n.lr), alpha = options.number(n.alpha);
    const RmspropRule rule = {options.gradient(),         alpha, 1 - alpha, options.number(n.eps),
                              options.number(n.momentum), -lr};
    const bool centered = options.flag(n.centered);
    const std::initializer_list<double> numbers = {
        rule.gradient.weight_decay, alpha, rule.epsilon, rule.momentum, lr};
    return options.fits &&
           for_parameters(parameters, numbers, [&](const at::Tensor& p, Update& u, PyObject* s) {
             u.rule = rule;
             return next_step(s) >= 1 && writes(p, 1) &&
                    has_state(p, s, n.square_avg, 2, u.state[0]) &&
                    (!centered || has_state(p, s, n.grad_avg, 1, u.state[1])) &&
                    (rule.momentum <= 0 || has_state(p, s, n.momentum_buffer, 2, u.state[2]));
           });
  }

  bool find_adagrad(Options& options, PyObject* parameters) {
    const OptimizerNames& n = optimizer_names();
    const double lr = options.number(n.lr), lr_decay = options.number(n.lr_decay);
    AdagradRule rule = {options.gradient(), options.number(n.eps), 0};
    const std::initializer_list<double> numbers = {rule.gradient.weight_decay, rule.epsilon};
    return options.fits &&
           for_parameters(parameters, numbers, [&](const at::Tensor& p, Update& u, PyObject* s) {
             const double step = next_step(s);
             rule.rate = -(lr / (1 + (step - 1) * lr_decay));
             u.rule = rule;
             return step >= 1 && takes(p.scalar_type(), {rule.rate}) && writes(p, 1) &&
                    has_state(p, s, n.sum, 1, u.state[0]);
           });
  }

  // Whether f(parameter, its update, its state or null) is true for all that have a gradient.
  template <class F>
  bool for_parameters(PyObject* parameters, std::initializer_list<double> numbers, const F& f) {
    for (const auto i : c10::irange(PyList_GET_SIZE(parameters))) {
      PyObject* object = PyList_GET_ITEM(parameters, i);
      if (!THPVariable_CheckExact(object)) {
        return false;
      }
      const at::Tensor& p = THPVariable_Unpack(object);
      if (!p.is_leaf()) {
        return false;
      }
      const at::Tensor& gradient = p.grad();
      if (!gradient.defined()) {
        continue;
      }
      const auto dtype = p.scalar_type();
      if ((dtype != at::kFloat && dtype != at::kDouble) || !is_dense(p) || !is_like(gradient, p) ||
          gradient.requires_grad() || !has_plain_object(gradient) || !takes(dtype, numbers)) {
        return false;
      }
      Update u = {};
      u.count = p.numel();
      u.gradient = gradient.const_data_ptr();
      reads(gradient);
      if (!f(p, u, state_of(states_, object))) {
        return false;
      }
      u.parameter = p.mutable_data_ptr();
      (dtype == at::kFloat ? floats_ : doubles_).push_back(u);
    }
    return true;
  }

  static bool is_dense(const at::Tensor& t) {
    return t.layout() == at::kStrided && t.is_cpu() && !t.is_nested() && !t.is_inference() &&
           !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
           t.is_non_overlapping_and_dense();
  }
  static bool is_like(const at::Tensor& t, const at::Tensor& p) {
    return t.layout() == at::kStrided && t.is_cpu() && !t.is_nested() && !t.is_inference() &&
           !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
           t.scalar_type() == p.scalar_type() && t.sizes() == p.sizes() &&
           t.strides() == p.strides();
  }

  // The tensor is changed by `operations`, each of which counts as a version.
  bool writes(const at::Tensor& t, int operations) {
    tensors_.push_back(&t);
    touched_.emplace_back(static_cast<const char*>(t.mutable_data_ptr()), t.nbytes());
    written_.emplace_back(t.unsafeGetTensorImpl(), operations);
    return true;
  }
  void reads(const at::Tensor& t) {
    tensors_.push_back(&t);
    touched_.emplace_back(static_cast<const char*>(t.const_data_ptr()), t.nbytes());
  }

  bool has_state(
      const at::Tensor& p, PyObject* state, PyObject* name, int operations, void*& data) {
    const at::Tensor* t = tensor_in(state, name);
    if (t == nullptr || !is_like(*t, p) || t->requires_grad()) {
      return false;
    }
    data = t->mutable_data_ptr();
    return writes(*t, operations);
  }

  // The number of the step that is to be made, as its tensor will have it; 0 if there is none.
  double next_step(PyObject* state) {
    const at::Tensor* t = tensor_in(state, optimizer_names().step);
    if (t == nullptr || !is_dense(*t) || t->dim() != 0 || t->requires_grad()) {
      return 0;
    }
    double next = 0;
    if (t->scalar_type() == at::kFloat) {
      next = *static_cast<const float*>(t->const_data_ptr()) + 1.0f;
    } else if (t->scalar_type() == at::kDouble) {
      next = *static_cast<const double*>(t->const_data_ptr()) + 1.0;
    }
    if (!(next >= 1) || !std::isfinite(next)) {
      return 0;
    }
    writes(*t, 1);
    steps_.push_back({t->mutable_data_ptr(), t->scalar_type(), next});
    return next;
  }

  // Whether no memory that is written is read or written as another tensor's, as only one tensor
  // after another would show. `order` is that of the last step: sorting begins with it.
  bool are_apart(std::vector<size_t>& order) const {
    const auto are_in_order = [&] {
      for (size_t i = 1; i < order.size(); ++i) {
        const auto& [begin, bytes] = touched_[order[i - 1]];
        if (begin + bytes > touched_[order[i]].first) {
          return false;
        }
      }
      return true;
    };
    if (order.size() == touched_.size() && are_in_order()) {
      return true;
    }
    order.resize(touched_.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(
        order.begin(), order.end(), [&](size_t a, size_t b) { return touched_[a] < touched_[b]; });
    return are_in_order();
  }

  void run_all() {
    if (!floats_.empty()) {
      update(at::kFloat, floats_);
    }
    if (!doubles_.empty()) {
      update(at::kDouble, doubles_);
    }
    for (const auto& [number, dtype, next] : steps_) {
      if (dtype == at::kFloat) {
        *static_cast<float*>(number) = static_cast<float>(next);
      } else {
        *static_cast<double*>(number) = next;
      }
    }
    for (const auto& [tensor, operations] : written_) {
      for (int i = 0; i < operations; ++i) {
        tensor->bump_version();
      }
    }
  }

  PyObject* states_ = nullptr;
  c10::SmallVector<Update, 16> floats_, doubles_;
  c10::SmallVector<const at::Tensor*, 64> tensors_;
  c10::SmallVector<std::pair<const char*, size_t>, 64> touched_;
  c10::SmallVector<std::pair<at::TensorImpl*, int>, 64> written_;
  struct Number {
    void* number;
    at::ScalarType dtype;
    double next;
  };
  c10::SmallVector<Number, 16> steps_;
};

// What is known of an optimiser, in the state in which it is.
std::shared_ptr<const Optimizer> known_optimizer(PyObject* optimizer) {
  plans::Found found;
  return known_of<Optimizer>(optimizer, [&](const Optimizer& state) {
    found = {};
    return fits(state.kind, optimizer, found);
  });
}

// Whether something sees what the stock methods do.
bool is_seen() {
  return is_watched() || c10::impl::dispatch_mode_enabled() || at::hasCallbacks() ||
         c10::InferenceMode::is_enabled() || watched_by_optimizers().functions.replaced() != 0 ||
         has_entries(watched_by_optimizers().hooks, watched_by_optimizers().places_of_hooks);
}

// Takes the gradients away, or fills them with zeros; whether it has, all of them.
bool zero_gradients(PyObject* own, bool to_none) {
  PyObject *groups = item(own, optimizer_names().param_groups),
           *defaults = item(own, optimizer_names().defaults);
  if (groups == nullptr || !PyList_CheckExact(groups) || defaults == nullptr ||
      !PyDict_CheckExact(defaults)) {
    return false;
  }
  c10::SmallVector<const at::Tensor*, 32> having;  // parameters
  for (const auto i : c10::irange(PyList_GET_SIZE(groups))) {
    PyObject* group = PyList_GET_ITEM(groups, i);
    PyObject* parameters =
        PyDict_CheckExact(group) ? item(group, optimizer_names().params) : nullptr;
    if (parameters == nullptr || !PyList_CheckExact(parameters)) {
      return false;
    }
    for (const auto j : c10::irange(PyList_GET_SIZE(parameters))) {
      PyObject* object = PyList_GET_ITEM(parameters, j);
      if (!THPVariable_CheckExact(object) || !THPVariable_Unpack(object).is_leaf()) {
        return false;
      }
      const at::Tensor& p = THPVariable_Unpack(object);
      if (p.grad().defined()) {
        having.push_back(&p);
      }
    }
  }
  if (to_none) {
    // They are let go at the end: the last reference may run Python code.
    c10::SmallVector<at::Tensor, 32> taken;
    for (const at::Tensor* p : having) {
      taken.push_back(std::move(p->mutable_grad()));
    }
    return true;
  }
  const auto is_on = [&](PyObject* name) {
    PyObject* option = item(defaults, name);
    return option != nullptr && !is_off(option);
  };
  c10::SmallVector<const at::Tensor*, 32> gradients;
  for (const at::Tensor* p : having) {
    const at::Tensor& g = p->grad();
    if (g.layout() != at::kStrided || g.is_inference() || g.requires_grad() ||
        !has_plain_object(g) || !g.is_non_overlapping_and_dense()) {
      return false;
    }
    gradients.push_back(&g);
  }
  const at::NoGradGuard none_is_recorded;
  if (is_on(optimizer_names().foreach) || is_on(optimizer_names().fused) ||
      (!gradients.empty() && !leads_to_cpu_kernel(gradients))) {
    return false;
  }
  for (const at::Tensor* g : gradients) {
    std::memset(g->mutable_data_ptr(), 0, g->nbytes());
    g->unsafeGetTensorImpl()->bump_version();
  }
  return true;
}

PyObject* told(Answer answer) {
  return Py_NewRef(
      answer == Answer::kUnknown   ? Py_None
      : answer == Answer::kRefused ? refused()
                                   : Py_True);
}

// (optimizer): True if its step is made; refused, and nothing done, where the stock class makes it;
// None where nothing is known of the optimiser.
PyObject* step_entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("optimizer_step", count, 1);
  return told(optimizer_step(args[0]));
  END_HANDLE_TH_ERRORS
}

// (optimizer, set_to_none): the same of its zero_grad.
PyObject* zero_grad_entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("optimizer_zero_grad", count, 2);
  return told(
      PyBool_Check(args[1]) ? optimizer_zero_grad(args[0], args[1] == Py_True) : Answer::kRefused);
  END_HANDLE_TH_ERRORS
}

void keep_optimizer(const py::object& optimizer, const py::tuple& kind, int64_t method) {
  known<Optimizer>().keep(optimizer, {plans::kind_of(kind), static_cast<Method>(method), {}});
}

size_t known_optimizers() { return known<Optimizer>().size(); }

PyMethodDef kOptimizerEntries[] = {
    entry("optimizer_step", step_entry, "optimizer_step(optimizer)"),
    entry("optimizer_zero_grad", zero_grad_entry, "optimizer_zero_grad(optimizer, set_to_none)"),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

Answer optimizer_step(PyObject* optimizer) {
  const auto state = known_optimizer(optimizer);
  if (state == nullptr) {
    return Answer::kUnknown;
  }
  const auto own = owned(PyObject_GenericGetDict(optimizer, nullptr));
  Step step;
  if (is_seen() || !step.find(*state, own.ptr())) {
    return Answer::kRefused;
  }
  step.run();
  return Answer::kDone;
}

Answer optimizer_zero_grad(PyObject* optimizer, bool set_to_none) {
  if (known_optimizer(optimizer) == nullptr) {
    return Answer::kUnknown;
  }
  const auto own = owned(PyObject_GenericGetDict(optimizer, nullptr));
  return !is_seen() && zero_gradients(own.ptr(), set_to_none) ? Answer::kDone : Answer::kRefused;
}

void add_optimizers(py::module_& m) {
  optimizer_names();
  add_entries(m, kOptimizerEntries);
  m.def("watch_optimizers", watch_optimizers);
  m.def("keep_optimizer", keep_optimizer);
  m.def("known_optimizers", known_optimizers);
}

}  // namespace mylayers::python
