// The Python module mylayers._C: entries for eager calls of the operators, and facts
// about this build. The only file that includes Python headers; a program without Python
// links the others.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/Exceptions.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "center.h"
#include "cpu/gemm.h"
#include "cpu/gemm_amx.h"
#include "cpu/huge_pages.h"
#include "linear_act.h"
#include "sequential.h"
#include "training.h"
#include "watched_functions.h"

namespace py = pybind11;

namespace {

// The operators' entries take their arguments by position through CPython's own calling
// convention: pybind11's, with its argument records, costs a fifth of a small call.

const at::Tensor& tensor_argument(const char* op, const char* name, PyObject* value) {
  TORCH_CHECK_TYPE(
      THPVariable_Check(value), op, ": ", name, " must be a torch.Tensor; got ",
      Py_TYPE(value)->tp_name);
  return THPVariable_Unpack(value);
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

// (input, weight, bias or None, activation or None)
PyObject* linear_act(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr const char* op = "linear_act";
  check_count(op, count, 4);
  const at::Tensor& x = tensor_argument(op, "input", args[0]);
  const at::Tensor& w = tensor_argument(op, "weight", args[1]);
  mylayers::OptionalTensor b;
  if (args[2] != Py_None) {
    b = tensor_argument(op, "bias", args[2]);
  }
  mylayers::ActivationName act;
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
  const bool is_short = has_plain_sizes(x) && has_plain_sizes(w) && w.dim() == 2 &&
                        w.size(1) <= kShort && x.numel() * w.size(1) <= kShort;
  return wrapped(is_short, [&] { return mylayers::linear_act(x, w, b, act); });
  END_HANDLE_TH_ERRORS
}

// (input, None, an int or a sequence of them)
PyObject* center(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("center", count, 2);
  const at::Tensor& x = tensor_argument("center", "input", args[0]);
  const py::handle dim = args[1];
  c10::SmallVector<int64_t, 6> dims;
  if (!dim.is_none()) {
    if (PySequence_Check(dim.ptr()) && !PyUnicode_Check(dim.ptr()) && !PyBytes_Check(dim.ptr())) {
      for (const py::handle d : py::reinterpret_borrow<py::sequence>(dim)) {
        dims.push_back(dim_argument(d));
      }
    } else {
      dims.push_back(dim_argument(dim));
    }
  }
  const auto list = dim.is_none() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(dims);
  const bool is_short = has_plain_sizes(x) && x.numel() <= kShort;
  return wrapped(is_short, [&] { return mylayers::center(x, list); });
  END_HANDLE_TH_ERRORS
}

// ---- FusedSequential ---------------------------------------------------------------------------
//
// A chain is the pattern of consecutive children of a FusedSequential that one program computes:
// each child's class and the attributes that its step follows from. Before each call the children
// are compared with it, and their parameters are read, so nothing that a chain holds goes stale;
// mylayers/sequential.py makes a new one where it does not fit.

struct Chain {
  struct Child {
    py::object cls;
    unsigned version;  // CPython's own number for a state of a class, new after any change
    std::vector<std::pair<py::object, py::object>> attributes;
    bool is_linear, has_bias;
  };
  mylayers::Program program;
  unsigned parent;             // version of the parent's class
  Py_ssize_t first, siblings;  // place of the first child, and how many children there are
  std::vector<Child> children;
  mutable mylayers::WatchedFunctions functions = {};  // that the children would call

  static constexpr const char* kName = "mylayers.Chain";
};

unsigned version(PyObject* cls) { return reinterpret_cast<PyTypeObject*>(cls)->tp_version_tag; }

unsigned fresh_version(const py::object& cls) {
  py::getattr(cls, "forward");  // looking an attribute up gives the class its number
  return version(cls.ptr());
}

// (program, the parent's class, first, siblings, children): each child (class, attributes, is
// linear, has bias), each attribute (name, value).
py::capsule make_chain(
    const std::string& program, const py::object& parent, Py_ssize_t first, Py_ssize_t siblings,
    const py::tuple& children) {
  auto chain = std::make_unique<Chain>(
      Chain{mylayers::Program(program), fresh_version(parent), first, siblings, {}});
  for (const py::handle item : children) {
    const auto child = item.cast<py::tuple>();
    Chain::Child made{
        child[0], fresh_version(child[0]), {}, child[2].cast<bool>(), child[3].cast<bool>()};
    for (const py::handle attribute : child[1]) {
      const auto pair = attribute.cast<py::tuple>();
      made.attributes.emplace_back(pair[0], pair[1]);
    }
    chain->children.push_back(std::move(made));
    chain->functions.add(child[0]);
  }
  return py::capsule(chain.release(), Chain::kName, [](PyObject* capsule) {
    delete static_cast<Chain*>(PyCapsule_GetPointer(capsule, Chain::kName));
  });
}

// Names looked up on every call.
struct Names {
  PyObject* whole = PyUnicode_InternFromString("_whole");
  PyObject* modules = PyUnicode_InternFromString("_modules");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
  PyObject* weight = PyUnicode_InternFromString("weight");
  PyObject* bias = PyUnicode_InternFromString("bias");
  PyObject* forward = PyUnicode_InternFromString("forward");
  PyObject* compiled = PyUnicode_InternFromString("_compiled_call_impl");
  PyObject* hooks[4] = {
      PyUnicode_InternFromString("_forward_hooks"),
      PyUnicode_InternFromString("_forward_pre_hooks"),
      PyUnicode_InternFromString("_backward_hooks"),
      PyUnicode_InternFromString("_backward_pre_hooks")};
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

// Whether a module, given by its __dict__, does nothing but its class's forward.
bool is_plain(const Names& names, PyObject* own) {
  for (PyObject* name : names.hooks) {
    PyObject* hooks = PyDict_GetItemWithError(own, name);
    if (hooks == nullptr || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0) {
      return false;
    }
  }
  return !PyDict_GetItemWithError(own, names.forward) &&
         !PyDict_GetItemWithError(own, names.compiled);
}

bool fits(const Names& names, const Chain::Child& child, PyObject* module, PyObject* own) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != child.cls.ptr() ||
      version(child.cls.ptr()) != child.version || child.version == 0 || !is_plain(names, own)) {
    return false;
  }
  for (const auto& [name, value] : child.attributes) {
    if (PyDict_GetItemWithError(own, name.ptr()) != value.ptr()) {
      return false;
    }
  }
  return true;
}

// Tensors held through their Python objects, whose count needs no lock: a count of a tensor that
// Python knows takes the GIL each time, 50 ns.
class Held {
 public:
  Held() = default;
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() {
    for (at::Tensor& t : tensors_) {
      Borrow::destroyBorrow(t);
    }
  }

  // Whether there is a tensor of that name, and not of a class of its own.
  bool take(PyObject* parameters, PyObject* name) {
    PyObject* value = PyDict_GetItemWithError(parameters, name);
    if (value == nullptr || !THPVariable_CheckExact(value)) {
      return false;
    }
    objects_.push_back(py::reinterpret_borrow<py::object>(value));
    tensors_.push_back(Borrow::createBorrow(THPVariable_Unpack(value)));
    return true;
  }
  const at::Tensor& back() const { return tensors_.back(); }
  at::TensorList list() const { return tensors_; }

 private:
  using Borrow = c10::MaybeOwnedTraits<at::Tensor>;
  c10::SmallVector<py::object, 16> objects_;
  c10::SmallVector<at::Tensor, 16> tensors_;
};

const Chain* chain_of(PyObject* capsule) {
  const auto* chain = static_cast<Chain*>(PyCapsule_GetPointer(capsule, Chain::kName));
  if (chain == nullptr) {
    throw python_error();
  }
  return chain;
}

// compute(input, parameters, is_short) for the chain; NotImplemented where the chain does not fit
// the children, or something watches calls by their Python name.
template <class Compute>
PyObject* run(
    const Names& names, const Chain* chain, PyObject* modules, PyObject* input,
    const Compute& compute) {
  const auto refuse = [] { return Py_NewRef(Py_NotImplemented); };
  if (!THPVariable_CheckExact(input) || !PyDict_CheckExact(modules) ||
      PyDict_GET_SIZE(modules) != chain->siblings || at::impl::torch_function_mode_enabled() ||
      at::tracer::impl::is_dispatch_enabled() || chain->functions.replaced() != 0) {
    return refuse();
  }
  for (const py::object& hooks : names.global_hooks) {
    if (PyDict_GET_SIZE(hooks.ptr()) != 0) {
      return refuse();
    }
  }
  const at::Tensor& x = THPVariable_Unpack(input);
  Held parameters;
  int64_t work_per_row = 0;
  Py_ssize_t position = 0, place = 0;
  PyObject* module = nullptr;
  auto child = chain->children.begin();
  while (child != chain->children.end() && PyDict_Next(modules, &position, nullptr, &module)) {
    if (place++ < chain->first) {
      continue;
    }
    const auto own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!own || !fits(names, *child, module, own.ptr())) {
      PyErr_Clear();
      return refuse();
    }
    if (child->is_linear) {
      PyObject* own_parameters = PyDict_GetItemWithError(own.ptr(), names.parameters);
      if (own_parameters == nullptr || !PyDict_Check(own_parameters)) {
        return refuse();
      }
      if (!parameters.take(own_parameters, names.weight)) {
        return refuse();
      }
      const at::Tensor& weight = parameters.back();
      work_per_row += has_plain_sizes(weight) ? weight.numel() : kShort;
      const bool takes_bias = child->has_bias
                                  ? parameters.take(own_parameters, names.bias)
                                  : PyDict_GetItemWithError(own_parameters, names.bias) == Py_None;
      if (!takes_bias) {
        return refuse();
      }
    }
    ++child;
  }
  const bool is_short = has_plain_sizes(x) && work_per_row <= kShort && x.numel() <= kShort &&
                        x.numel() * work_per_row <= kShort * (x.dim() ? x.size(-1) : 1);
  return compute(x, parameters.list(), is_short);
}

PyObject* run(const Names& names, const Chain* chain, PyObject* modules, PyObject* input) {
  return run(
      names, chain, modules, input,
      [&](const at::Tensor& x, at::TensorList parameters, bool is_short) {
        return wrapped(
            is_short, [&] { return mylayers::sequential(x, parameters, chain->program); });
      });
}

const Names& names() {
  static const Names& once = *new Names();  // outlives the interpreter's own end
  return once;
}

// (chain, the parent's _modules, input)
PyObject* run_chain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("run_chain", count, 3);
  return run(names(), chain_of(args[0]), args[1], args[2]);
  END_HANDLE_TH_ERRORS
}

// A module's __dict__.
py::object dict_of(PyObject* module) {
  auto own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  if (!own) {
    throw python_error();
  }
  return own;
}

// The chain that is all of a FusedSequential, given with its __dict__; none if it has no such, or
// if a call would do more.
const Chain* whole_chain(PyObject* network, PyObject* own) {
  PyObject* whole = PyDict_GetItemWithError(own, names().whole);
  if (whole == nullptr || !is_plain(names(), own)) {
    return nullptr;
  }
  const Chain* chain = chain_of(whole);
  const bool same_class = version(reinterpret_cast<PyObject*>(Py_TYPE(network))) == chain->parent;
  return same_class && chain->parent != 0 ? chain : nullptr;
}

// (a FusedSequential, input): its whole chain, if it has one and a call would do nothing else.
PyObject* call_fused(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("call_fused", count, 2);
  const py::object own = dict_of(args[0]);
  const Chain* chain = whole_chain(args[0], own.ptr());
  PyObject* modules = PyDict_GetItemWithError(own.ptr(), names().modules);
  if (chain == nullptr || modules == nullptr) {
    return Py_NewRef(Py_NotImplemented);
  }
  return run(names(), chain, modules, args[1]);
  END_HANDLE_TH_ERRORS
}

mylayers::Criterion criterion_argument(PyObject* value) {
  TORCH_CHECK_TYPE(
      PyTuple_Check(value) && PyTuple_GET_SIZE(value) == 4,
      "forward_backward: criterion must be (kind, reduction, constant, ignored)");
  const auto item = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(value, i); };
  const mylayers::Criterion criterion{
      static_cast<mylayers::Criterion::Kind>(PyLong_AsLong(item(0))), PyLong_AsLong(item(1)),
      PyFloat_AsDouble(item(2)), PyLong_AsLong(item(3))};
  if (PyErr_Occurred() != nullptr) {
    throw python_error();
  }
  return criterion;
}

// What PyTorch's losses and a backward call. Not a static of its own making, which would be waited
// for with the GIL held while the import gives it up.
mylayers::WatchedFunctions& functions_of_training() {
  static mylayers::WatchedFunctions* found = nullptr;
  if (found == nullptr) {
    auto made = std::make_unique<mylayers::WatchedFunctions>();
    made->add(py::module_::import("torch.nn.modules.loss").attr("_Loss"));
    found = made.release();
  }
  return *found;
}

// (a FusedSequential, a loss's module or None, what the loss is, input, target): the loss, its
// gradients added to the parameters'; NotImplemented, and nothing done, where a graph is needed.
PyObject* forward_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count("forward_backward", count, 5);
  const py::object own = dict_of(args[0]);
  const Chain* chain = whole_chain(args[0], own.ptr());
  PyObject* modules = PyDict_GetItemWithError(own.ptr(), names().modules);
  const bool has_plain_loss = args[1] == Py_None || is_plain(names(), dict_of(args[1]).ptr());
  if (chain == nullptr || modules == nullptr || !has_plain_loss ||
      functions_of_training().replaced() != 0 || !THPVariable_CheckExact(args[4])) {
    return Py_NewRef(Py_NotImplemented);
  }
  const mylayers::Criterion criterion = criterion_argument(args[2]);
  const at::Tensor& target = THPVariable_Unpack(args[4]);
  PyObject* loss =
      run(names(), chain, modules, args[3],
          [&](const at::Tensor& x, at::TensorList parameters, bool is_short) {
            return wrapped(is_short, [&] {
              return mylayers::forward_backward(x, parameters, chain->program, criterion, target);
            });
          });
  if (loss == Py_None) {
    Py_DECREF(loss);
    return Py_NewRef(Py_NotImplemented);
  }
  return loss;
  END_HANDLE_TH_ERRORS
}

PyMethodDef kOperators[] = {
    {"linear_act", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_act)),
     METH_FASTCALL, "linear_act(input, weight, bias, activation)"},
    {"center", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(center)), METH_FASTCALL,
     "center(input, dim)"},
    {"run_chain", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run_chain)),
     METH_FASTCALL, "run_chain(chain, modules, input)"},
    {"call_fused", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_fused)),
     METH_FASTCALL, "call_fused(fused_sequential, input)"},
    {"forward_backward",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward_backward)), METH_FASTCALL,
     "forward_backward(fused_sequential, loss_module, loss, input, target)"},
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
  info["tuned_for"] = mylayers::cpu::kernels().tuned_for;
  info["amx"] = mylayers::cpu::has_amx();
  info["bfloat16_units"] = mylayers::cpu::has_bf16_units();
  info["huge_pages"] = mylayers::cpu::wants_huge_pages();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of mylayers; use mylayers.functional and mylayers.MyLinear.";
  if (PyModule_AddFunctions(m.ptr(), kOperators) != 0) {
    throw py::error_already_set();
  }
  m.def("make_chain", make_chain);
  m.def("build_info", build_info);
}
