// The gradients of a linear layer, on pointers.
#pragma once

#include "gemm.h"

namespace mylayers::cpu {

template <class T>
struct LinearGradients {
  int64_t rows, in_units, units;
  Matrix<T> dy;  // (rows, units), unit column stride
  const T* y;    // (rows, units) contiguous, what the activation's derivative is a function of
  Activation activation;
  Matrix<T> x;       // (rows, in_units), read for dw
  Matrix<T> weight;  // (in_units, units), read for dx
  bool transposed;   // dw is (units, in_units)
  // Contiguous; null where not asked for.
  T *dx, *dw, *db;
};

template <class T>
void linear_gradients(const LinearGradients<T>& of);

}  // namespace mylayers::cpu
