#include "gemm_aten.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "activation.h"
#include "machine/tuning.h"
#include "scratch.h"

namespace mylayers::cpu {
namespace {

// Multiply-adds up to which a product takes less time on any processor than PyTorch's function
// takes to begin: 2^15 are 8192 instructions on vectors of 16 bytes.
constexpr double kSmallProduct = 1 << 15;

template <class T>
constexpr at::ScalarType kScalarType = std::is_same_v<T, float>    ? at::kFloat
                                       : std::is_same_v<T, double> ? at::kDouble
                                       : std::is_same_v<T, half_t> ? at::kHalf
                                                                   : at::kBFloat16;

// Borrows; what is const is only read.
template <class T>
at::Tensor tensor(const T* data, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return at::from_blob(const_cast<T*>(data), sizes, strides, kScalarType<T>);
}

}  // namespace

bool has_aten_products() {
  static const bool has = [] {
    const char* given = std::getenv("MYLAYERS_PRODUCTS");
    const std::string value = given ? given : "";
    if (!value.empty() && value != "own") {
      throw std::invalid_argument(
          "mylayers: MYLAYERS_PRODUCTS must be \"own\" or not be set; got \"" + value + "\"");
    }
    return value.empty() && !machine().measured;
  }();
  return has;
}

bool is_aten_product(int64_t m, int64_t n, int64_t k) {
  return has_aten_products() &&
         static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) > kSmallProduct;
}

template <class T>
void gemm_aten(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias, Activation act,
    T* c) {
  // The CPU's functions themselves: no mode and no autograd is to see these tensors.
  at::Tensor out = tensor(c, {m, n}, {n, 1});
  const at::Tensor x = tensor(a.data, {m, k}, {a.row, a.col});
  const at::Tensor y = tensor(b.data, {k, n}, {b.row, b.col});
  if (bias) {
    at::cpu::addmm_out(out, tensor(bias, {n}, {1}), x, y);
  } else {
    at::cpu::mm_out(out, x, y);
  }
  if (act != Activation::kNone) {
    activate(m * n, c, act, c);
  }
}

#define INSTANTIATE(T)        \
  template void gemm_aten<T>( \
      int64_t, int64_t, int64_t, Matrix<T>, Matrix<T>, const T*, Activation, T*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(half_t)
INSTANTIATE(bfloat16_t)
#undef INSTANTIATE

}  // namespace mylayers::cpu
