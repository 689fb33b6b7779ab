// step() and zero_grad() of PyTorch's optimisers.
#pragma once

#include <pybind11/pybind11.h>

namespace mylayers::python {

void add_optimizers(pybind11::module_& m);

}  // namespace mylayers::python
