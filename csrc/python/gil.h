// When a call keeps the GIL.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

#include "../dispatch/questions.h"
#include "held.h"

namespace mylayers::python {

// Multiply-adds, or elements, up to which a call keeps the GIL: it is over in a microsecond, and
// would notice that the GIL is handed on and taken back.
inline constexpr int64_t kShort = 1 << 14;

// The same where no other thread is there to take it.
inline constexpr int64_t kShortAlone = 1 << 19;

inline int64_t short_now() {
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
    const pybind11::gil_scoped_release other_threads_may_run;
    output = f();
  }
  return THPVariable_Wrap(std::move(output));
}

// The same of these tensors, which the call owns where something else may run meanwhile.
template <class F>
PyObject* wrapped(bool is_short, Shortcut shortcut, Held& tensors, F&& f) {
  if (!is_short || may_run_python(shortcut)) {
    tensors.own();
  }
  return wrapped(is_short, std::forward<F>(f));
}

inline bool has_plain_sizes(const at::Tensor& t) {
  return t.is_cpu() && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

}  // namespace mylayers::python
