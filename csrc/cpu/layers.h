// Linear layers that follow each other, a block of rows at a time, so that what one layer writes is
// in cache when the next reads it.
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include "../steps/program.h"
#include "gemm.h"
#include "gemm/plan.h"
#include "linear_layer.h"

namespace mylayers::cpu {

// A linear step, and the activation that follows it as a step of its own, if there is one.
struct LinearAndActivation {
  const LinearStep* linear;
  const ActivationStep* activation = nullptr;

  const Step& last() const { return activation ? static_cast<const Step&>(*activation) : *linear; }
};

// Those of which each reads only what the one before it makes. An activation whose derivative is a
// function of its output alone stands in the linear step.
c10::SmallVector<LinearAndActivation, 8> linear_run_from(const Program& program, size_t first);

template <class T>
struct Layer : LinearLayer<T> {
  Activation activation;
  bool is_step;  // the activation is one, and takes X @ W + b as it is kept: rounded
  T* sums;       // where that is kept, if backward reads it
  T* output;     // null: only the next layer reads it
  // If they were made beforehand: of 1, 2, ... rows; those of more ask for theirs.
  c10::ArrayRef<Plan> plans = {};
};

// x (rows, in_units of the first) through all of them, the last of which has an output.
template <class T>
void run_layers(int64_t rows, Matrix<T> x, c10::ArrayRef<Layer<T>> layers);

}  // namespace mylayers::cpu
