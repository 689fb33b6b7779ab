// step() and zero_grad() of PyTorch's optimisers.
#pragma once

#include <pybind11/pybind11.h>

namespace mylayers::python {

enum class Answer {
  kUnknown,  // nothing is known of the optimiser as it is
  kRefused,  // the stock class does it; nothing was done
  kDone,
};

Answer optimizer_step(PyObject* optimizer);
Answer optimizer_zero_grad(PyObject* optimizer, bool set_to_none);

void add_optimizers(pybind11::module_& m);

}  // namespace mylayers::python
