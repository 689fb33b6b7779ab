// The activations of kernels.h, and their derivatives, on CUDA.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels.h"

namespace mylayers::cuda {

// The standard normal distribution's share below z.
__device__ __forceinline__ float normal_below(float z) { return normcdff(z); }
__device__ __forceinline__ double normal_below(double z) { return normcdf(z); }

// Every comparison is false for NaN, which so passes on.
template <ActivationKind kAct, class C>
__device__ __forceinline__ C activated(C z) {
  if constexpr (kAct == Activation::kRelu) {
    return z < 0 ? C(0) : z;  // keeps -0, as torch.relu does
  } else if constexpr (kAct == Activation::kTanh) {
    return std::tanh(z);
  } else if constexpr (kAct == Activation::kSigmoid) {
    return 1 / (1 + std::exp(-z));
  } else if constexpr (kAct == Activation::kElu) {
    return z < 0 ? std::expm1(z) : z;
  } else if constexpr (kAct == Activation::kGelu) {
    return z * normal_below(z);
  } else if constexpr (kAct == Activation::kGeluTanh) {
    constexpr C kSlope = 1.5957691216057308, kCubic = 0.044715;  // 2 sqrt(2 / pi)
    return z / (1 + std::exp(-kSlope * z * (1 + kCubic * z * z)));
  } else {
    return z;
  }
}

// act'(z) * g as a function of y = act(z), for the NaN and the zeros of y as PyTorch has it; of
// activations whose derivative is a function of that (csrc/activation.h).
template <ActivationKind kAct, class C>
__device__ __forceinline__ C activation_gradient(C g, C y) {
  if constexpr (kAct == Activation::kRelu) {
    return y <= 0 ? C(0) : g;
  } else if constexpr (kAct == Activation::kTanh) {
    return g * (1 - y * y);
  } else if constexpr (kAct == Activation::kSigmoid) {
    return g * (1 - y) * y;
  } else if constexpr (kAct == Activation::kElu) {
    return y <= 0 ? g * (y + 1) : g;
  } else {
    return g;
  }
}

// f(Constant<act>{}).
template <ActivationKind kAct>
using Constant = std::integral_constant<ActivationKind, kAct>;

template <class F>
void with_activation(ActivationKind act, const F& f) {
  switch (act) {
    case Activation::kNone:
      return f(Constant<Activation::kNone>{});
#define CASE(enumerator)       \
  case Activation::enumerator: \
    return f(Constant<Activation::enumerator>{});
      MYLAYERS_CUDA_ACTIVATIONS(CASE)
#undef CASE
    default:
      return;  // has_activation says so
  }
}

}  // namespace mylayers::cuda
