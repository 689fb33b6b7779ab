// The class behind mylayers.freeze.
#pragma once

#include <pybind11/pybind11.h>

namespace mylayers::python {

void add_frozen(pybind11::module_& m);

}  // namespace mylayers::python
