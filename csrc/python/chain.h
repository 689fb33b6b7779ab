// FusedSequential, a layer alone and forward_backward, and what is known of modules.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "../sequential.h"
#include "held.h"
#include "plans.h"

namespace mylayers::python {

// Whether there are hooks on all modules.
bool has_global_hooks();

// Which functions that layers call are replaced; 0 if none is, another number for other ones.
uint64_t replaced_functions();

// Whether the parameters that were found of a layer are those that a step of a program is for.
bool fits_step(const Step& step, const plans::Found& found);

// The program's result of input and parameters.
PyObject* run_program(const Program& program, Held& tensors);

void add_chain(pybind11::module_& m);

}  // namespace mylayers::python
