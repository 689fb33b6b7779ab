// FusedSequential, a layer alone and forward_backward, and what is known of modules.
#pragma once

#include <pybind11/pybind11.h>

namespace mylayers::python {

void add_chain(pybind11::module_& m);

}  // namespace mylayers::python
