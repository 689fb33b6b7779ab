// Activations that stand apart from a product.
#pragma once

#include <ATen/core/Tensor.h>

#include "../activation.h"

namespace mylayers::cpu {

// out (count) = act(in), shared among threads; out may be in.
template <class T>
void activate(int64_t count, const T* in, Activation act, T* out);

// act(x), and grad * act' from what the derivative is a function of. Unlike ATen's, a value's bits
// do not depend on where it lies.
at::Tensor activation(const at::Tensor& x, Activation act);
at::Tensor activation_backward(
    const at::Tensor& grad_output, const at::Tensor& saved, Activation act);

}  // namespace mylayers::cpu
