// Regions of forwards that users wrote.
#pragma once

#include <pybind11/pybind11.h>

namespace mylayers::python {

void add_forwards(pybind11::module_& m);

}  // namespace mylayers::python
