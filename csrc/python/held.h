// Python objects, and tensors by them, held during a call.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

namespace mylayers::python {

namespace py = pybind11;

inline py::object borrowed(PyObject* object) { return py::reinterpret_borrow<py::object>(object); }

inline py::object owned(PyObject* object) {
  if (object == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(object);
}

// Tensors held through their Python objects, whose count needs no lock: a count of a tensor that
// Python knows takes the GIL each time. That is enough while no other thread can run, which
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

}  // namespace mylayers::python
