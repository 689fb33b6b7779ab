// The operators as Python calls them eagerly.
#pragma once

#include <pybind11/pybind11.h>

#include "../linear_act.h"
#include "held.h"

namespace mylayers::python {

// act(x @ w + b) of input, weight and, if it has one, bias.
PyObject* run_linear_act(Held& tensors, bool has_bias, Activation activation);

// linear_act, center
void add_operators(pybind11::module_& m);

}  // namespace mylayers::python
