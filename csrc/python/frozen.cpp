// Calls of a frozen network, by CPython's vectorcall: no attribute is looked up and no plan
// compared. What is not plain goes to mylayers/frozen.py, which converts it or says what is wrong.
#include "frozen.h"

#include "../frozen.h"

#include <ATen/ops/from_blob.h>
#include <ATen/TracerMode.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <structmember.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/dtypes.h"
#include "arguments.h"
#include "gil.h"
#include "held.h"

namespace mylayers::python {
namespace {

struct FrozenObject {
  PyObject_HEAD vectorcallfunc call;
  std::shared_ptr<const Frozen> packed;  // exchanged whole, under the GIL
};

FrozenObject& frozen(PyObject* self) { return *reinterpret_cast<FrozenObject*>(self); }

// Which arguments this leaves to Python: call(frozen, input, out).
PyObject* slow_call = nullptr;

// ---- arrays ------------------------------------------------------------------------------------

// A tensor or an array of NumPy, as kernels see it; strides in elements.
struct View {
  char* data;
  c10::SmallVector<int64_t, 4> sizes, strides;

  int64_t numel() const { return c10::multiply_integers(sizes); }
};

bool is_numpy(PyObject* object) {
  return std::strcmp(Py_TYPE(object)->tp_name, "numpy.ndarray") == 0;
}

// As NumPy numbers them; none for what it has not.
std::optional<int> numpy_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return 23;
    case at::kFloat:
      return py::detail::npy_api::NPY_FLOAT_;
    case at::kDouble:
      return py::detail::npy_api::NPY_DOUBLE_;
    default:
      return std::nullopt;
  }
}

// None unless the tensor itself, whatever the thread's modes, is plain: dense, of this dtype, on
// the CPU, all of it there, and nothing that says otherwise what its memory means.
std::optional<View> view_of_tensor(const at::Tensor& t, at::ScalarType dtype) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kPlain(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView,
       DispatchKey::AutocastCPU});
  if (!kPlain.has_all(t.key_set()) || t.scalar_type() != dtype || !has_kernel(t) ||
      t.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    return std::nullopt;
  }
  return View{
      static_cast<char*>(const_cast<void*>(t.const_data_ptr())),
      {t.sizes().begin(), t.sizes().end()},
      {t.strides().begin(), t.strides().end()}};
}

std::optional<View> view_of_array(const py::array& array, at::ScalarType dtype, bool writes) {
  using api = py::detail::npy_api;
  const auto type = array.dtype();
  const auto item = static_cast<int64_t>(array.itemsize());
  const int flags = api::NPY_ARRAY_ALIGNED_ | (writes ? api::NPY_ARRAY_WRITEABLE_ : 0);
  if (type.num() != numpy_type(dtype) || type.byteorder() != '=' ||
      (array.flags() & flags) != flags) {
    return std::nullopt;
  }
  View view{
      static_cast<char*>(const_cast<void*>(array.data())),
      {array.shape(), array.shape() + array.ndim()},
      {}};
  for (py::ssize_t d = 0; d < array.ndim(); ++d) {
    const int64_t stride = array.strides(d);
    if (stride < 0 || stride % item != 0) {
      return std::nullopt;
    }
    view.strides.push_back(stride / item);
  }
  return view;
}

std::optional<View> view_of(PyObject* object, at::ScalarType dtype, bool writes) {
  if (THPVariable_CheckExact(object)) {
    return view_of_tensor(THPVariable_Unpack(object), dtype);
  }
  if (is_numpy(object)) {
    return view_of_array(py::reinterpret_borrow<py::array>(object), dtype, writes);
  }
  return std::nullopt;
}

// From one row of `view` to the next, all dimensions but the last being rows; none if they do not
// lie evenly, or their values not side by side.
std::optional<int64_t> row_distance(const View& view) {
  const size_t last = view.sizes.size() - 1;
  if (view.numel() == 0) {  // of which NumPy gives no strides
    return view.sizes[last];
  }
  if (view.strides[last] != 1 && view.sizes[last] > 1) {
    return std::nullopt;
  }
  std::optional<int64_t> distance;
  int64_t rows = 1;
  for (size_t d = last; d-- > 0;) {
    if (view.sizes[d] == 1) {
      continue;
    }
    if (distance.has_value() && view.strides[d] != *distance * rows) {
      return std::nullopt;
    }
    distance = distance.value_or(view.strides[d]);
    rows *= view.sizes[d];
  }
  return distance.value_or(view.sizes[last]);
}

bool is_contiguous(const View& view) {
  int64_t stride = 1;
  for (size_t d = view.sizes.size(); d-- > 0;) {
    if (view.sizes[d] != 1 && view.strides[d] != stride) {
      return view.numel() == 0;
    }
    stride *= view.sizes[d];
  }
  return true;
}

bool overlap(const View& a, const View& b, int64_t item) {
  const auto end = [&](const View& view) {
    int64_t last = 1;
    for (size_t d = 0; d < view.sizes.size(); ++d) {
      last += (view.sizes[d] - 1) * view.strides[d];
    }
    return view.data + last * item;
  };
  return a.numel() > 0 && b.numel() > 0 && a.data < end(b) && b.data < end(a);
}

// ---- calls -------------------------------------------------------------------------------------

// f(), with the GIL if it is a short call.
template <class F>
void computing(bool keeps_gil, F&& f) {
  if (keeps_gil) {
    f();
    return;
  }
  const py::gil_scoped_release other_threads_may_run;
  f();
}

// What autograd is told of a tensor that is written to; refuses one of inference mode outside it.
void mark_changed(PyObject* tensor) {
  if (tensor != nullptr) {
    THPVariable_Unpack(tensor).unsafeGetTensorImpl()->bump_version();
  }
}

// Whether no mode of this thread would see or change what is computed.
bool is_plain_thread() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kPlain(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView,
       DispatchKey::BackendSelect});
  const auto modes = c10::impl::tls_local_dispatch_key_set();
  return kPlain.has_all(modes.included_ - modes.excluded_) && !at::hasCallbacks() &&
         !at::tracer::impl::is_dispatch_enabled();
}

bool asks_for_gradient(const at::Tensor& t) {
  if (t.unsafeGetTensorImpl()->autograd_meta() == nullptr) {
    return false;
  }
  return (at::GradMode::is_enabled() && t.requires_grad()) ||
         (torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr &&
          t._fw_grad(/*level=*/0).defined());
}

// The result, or none where something about the arguments is not plain. `asks`: whether the
// thread's modes are part of that.
py::object compute(const Frozen& packed, PyObject* input, PyObject* out, bool asks) {
  const bool is_tensor = THPVariable_CheckExact(input);
  const bool to_tensor = out != nullptr && THPVariable_CheckExact(out);
  if (asks && (!is_plain_thread() || (is_tensor && asks_for_gradient(THPVariable_Unpack(input))) ||
               (to_tensor && asks_for_gradient(THPVariable_Unpack(out))))) {
    return {};
  }
  const auto dtype = packed.dtype();
  const auto x = view_of(input, dtype, /*writes=*/false);
  const auto y = out == nullptr ? std::nullopt : view_of(out, dtype, /*writes=*/true);
  if (!x.has_value() || (out != nullptr && !y.has_value())) {
    return {};
  }
  const int64_t item = static_cast<int64_t>(c10::elementSize(dtype));
  if (y.has_value() && (!is_contiguous(*y) || overlap(*x, *y, item))) {
    return {};
  }
  // Rows, or values where it is not known what a row is.
  const int64_t rows = packed.is_layers() && !x->sizes.empty()
                           ? c10::multiply_integers(x->sizes.begin(), x->sizes.end() - 1)
                           : x->numel();
  const int64_t work = rows * packed.work_per_row();
  const bool keeps_gil = work <= kShort || work <= short_now();
  // Where something else may run meanwhile, it may exchange an object's tensor for another.
  const at::Tensor read = is_tensor && !keeps_gil ? THPVariable_Unpack(input) : at::Tensor();
  const at::Tensor written = to_tensor && !keeps_gil ? THPVariable_Unpack(out) : at::Tensor();
  if (!packed.is_layers()) {
    const at::Tensor given = is_tensor
                                 ? at::Tensor(THPVariable_Unpack(input))
                                 : at::from_blob(x->data, x->sizes, x->strides, at::dtype(dtype));
    at::Tensor made;
    computing(keeps_gil, [&] { made = packed(given); });
    if (out == nullptr) {
      auto result = owned(THPVariable_Wrap(std::move(made)));
      return is_tensor ? result : result.attr("numpy")();
    }
    TORCH_CHECK(
        made.sizes() == at::IntArrayRef(y->sizes), "Frozen: out must be ", made.sizes(),
        " for input ", at::IntArrayRef(x->sizes), "; got ", at::IntArrayRef(y->sizes));
    mark_changed(to_tensor ? out : nullptr);
    if (made.numel() > 0) {
      std::memcpy(y->data, made.const_data_ptr(), made.nbytes());
    }
  } else {
    if (x->sizes.empty() || x->sizes.back() != packed.in_units()) {
      return {};
    }
    const auto row = row_distance(*x);
    auto sizes = x->sizes;
    sizes.back() = packed.units();
    if (!row.has_value() || (y.has_value() && y->sizes != sizes)) {
      return {};
    }
    py::object made;
    char* to = nullptr;
    if (y.has_value()) {
      to = y->data;
    } else if (is_tensor) {
      at::Tensor fresh = at::native::empty_cpu(sizes, dtype);
      cpu::prefer_huge_pages(fresh.mutable_data_ptr(), fresh.nbytes());
      to = static_cast<char*>(fresh.mutable_data_ptr());
      made = owned(THPVariable_Wrap(std::move(fresh)));
    } else {
      py::array fresh(py::dtype(*numpy_type(dtype)), sizes);
      to = static_cast<char*>(fresh.mutable_data());
      made = std::move(fresh);
    }
    mark_changed(to_tensor ? out : nullptr);
    computing(keeps_gil, [&] { packed.run(rows, x->data, *row, to); });
    if (out == nullptr) {
      return made;
    }
  }
  return borrowed(out);
}

struct Arguments {
  PyObject* input = nullptr;
  PyObject* out = nullptr;  // none as null
};

Arguments arguments_of(PyObject* const* args, Py_ssize_t count, PyObject* names) {
  TORCH_CHECK_TYPE(
      count == 1, "Frozen: takes one positional argument, input, and out= by name; got ", count,
      " positional ones");
  Arguments found{args[0]};
  const Py_ssize_t named = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* name = PyTuple_GET_ITEM(names, i);
    TORCH_CHECK_TYPE(
        PyUnicode_CompareWithASCIIString(name, "out") == 0, "Frozen: takes input and out=; got ",
        std::string(py::str(name)), "=");
    found.out = args[count + i] == Py_None ? nullptr : args[count + i];
  }
  return found;
}

std::shared_ptr<const Frozen> packed_of(PyObject* self) {
  auto packed = frozen(self).packed;
  TORCH_CHECK(packed != nullptr, "Frozen: has no values; make it by mylayers.freeze");
  return packed;
}

PyObject* call(PyObject* self, PyObject* const* args, size_t count, PyObject* names) {
  HANDLE_TH_ERRORS
  const auto [input, out] = arguments_of(args, PyVectorcall_NARGS(count), names);
  auto result = compute(*packed_of(self), input, out, /*asks=*/true);
  if (!result) {
    return PyObject_CallFunctionObjArgs(
        slow_call, self, input, out == nullptr ? Py_None : out, nullptr);
  }
  return result.release().ptr();
  END_HANDLE_TH_ERRORS
}

// (frozen, input, out or None): the result, whatever the thread's modes.
py::object call_frozen(const py::object& self, const py::object& input, const py::object& out) {
  auto result =
      compute(*packed_of(self.ptr()), input.ptr(), out.is_none() ? nullptr : out.ptr(), false);
  TORCH_CHECK(
      result, "Frozen: input and out must be plain tensors or arrays with the memory of their ",
      "elements");
  return result;
}

// ---- the class ---------------------------------------------------------------------------------

PyObject* make(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* self = type->tp_alloc(type, 0);
  if (self != nullptr) {
    frozen(self).call = call;
    new (&frozen(self).packed) std::shared_ptr<const Frozen>();
  }
  return self;
}

void unmake(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  std::destroy_at(&frozen(self).packed);
  type->tp_free(self);
  Py_DECREF(type);
}

// (frozen, program, parameters): packs them, for the calls that begin from now on.
void pack(const py::object& self, const std::string& program, const std::vector<at::Tensor>& all) {
  std::shared_ptr<const Frozen> made;
  {
    const py::gil_scoped_release other_threads_may_call;
    made = std::make_shared<const Frozen>(program, all);
  }
  std::swap(frozen(self.ptr()).packed, made);
}

// (program, parameters), as they are packed.
py::tuple unpack(const py::object& self) {
  const auto packed = packed_of(self.ptr());
  py::list all;
  for (const at::Tensor& t : packed->parameters()) {
    all.append(owned(THPVariable_Wrap(t)));
  }
  return py::make_tuple(packed->program().text, py::tuple(all));
}

// (in_units, units); None of a program that is more than linear layers.
std::optional<std::pair<int64_t, int64_t>> sizes(const py::object& self) {
  const auto packed = packed_of(self.ptr());
  return packed->is_layers() ? std::optional(std::pair(packed->in_units(), packed->units()))
                             : std::nullopt;
}

PyMemberDef kMembers[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(FrozenObject, call), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};

PyType_Slot kSlots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(unmake)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, kMembers},
    {0, nullptr}};

PyType_Spec kSpec = {
    "mylayers._C.FrozenBase", sizeof(FrozenObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_VECTORCALL, kSlots};

// (a class derived from FrozenBase, what is called where it leaves a call to Python). Before Python
// 3.12 a class does not inherit that it is called by vectorcall.
void keep_frozen(const py::type& cls, const py::object& slow) {
  reinterpret_cast<PyTypeObject*>(cls.ptr())->tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL;
  Py_XSETREF(slow_call, Py_NewRef(slow.ptr()));
}

}  // namespace

void add_frozen(py::module_& m) {
  m.attr("FrozenBase") = owned(PyType_FromSpec(&kSpec));
  m.def("keep_frozen", keep_frozen);
  m.def("call_frozen", call_frozen);
  m.def("pack_frozen", pack);
  m.def("unpack_frozen", unpack);
  m.def("frozen_sizes", sizes);
}

}  // namespace mylayers::python
