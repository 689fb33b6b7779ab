// The kernels, on raw pointers and one stream: what linear_act.cpp and center.cpp call.
//
// T is float, double, c10::Half or c10::BFloat16. Matrices are row-major.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "../activation.h"
#include "../center_sizes.h"

namespace mylayers::cuda {

// The type in which values of T are multiplied and summed.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Those that have kernels here, as they are without a setting; ATen computes the others.
#define MYLAYERS_CUDA_ACTIVATIONS(X) X(kRelu) X(kTanh) X(kSigmoid) X(kElu) X(kGelu) X(kGeluTanh)

inline bool has_activation(Activation activation) {
  if (activation.setting != Activation::default_setting(activation)) {
    return false;
  }
  switch (activation.kind) {
#define CASE(enumerator) case Activation::enumerator:
    case Activation::kNone:
      MYLAYERS_CUDA_ACTIVATIONS(CASE)
#undef CASE
      return true;
    default:
      return false;
  }
}

// y (rows, cols) = act(z + bias), rounded once; bias may be null, and z be y itself.
template <class T, class Z>
void bias_act(
    int64_t rows, int64_t cols, const Z* z, const T* bias, Activation act, T* y,
    cudaStream_t stream);

// dz (rows, cols) = dy * act'(y), and db = its column sums, in one pass over dy (row stride
// dy_row) and y. Each of dz and db may be null, y where there is no activation. `partial` has
// mask_and_sum_partials<T>(rows, cols) elements.
template <class T>
void mask_and_sum(
    int64_t rows, int64_t cols, const T* dy, int64_t dy_row, const T* y, Activation act, T* dz,
    T* db, acc_t<T>* partial, cudaStream_t stream);
template <class T>
int64_t mask_and_sum_partials(int64_t rows, int64_t cols);

// out = x - mean(x), the mean rounded to T.
template <class T>
void subtract_mean(const CenterSizes& sizes, const T* x, T* out, cudaStream_t stream);

}  // namespace mylayers::cuda
