// linear_act on CUDA: forward and its three gradients.
//
// bias and relu are part of the product (gemm.cpp). The other activations take the product as it
// was summed, in float32 for the 16-bit types, and one pass over it that rounds once.
#include "../linear_act.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../dispatch/questions.h"
#include "gemm.h"
#include "kernels.h"

namespace mylayers::cuda {
namespace {

template <class T>
const T* data(const at::Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <class T>
T* mutable_data(const at::Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// (..., cols) seen as (rows, cols): a view where strides allow, else a copy.
at::Tensor as_rows(const at::Tensor& t) {
  if (t.dim() == 2) {
    return t;
  }
  int64_t rows = 1;
  for (const int64_t size : t.sizes().slice(0, t.dim() - 1)) {
    rows *= size;
  }
  return t.reshape({rows, t.size(-1)});
}

// The dtype in which products of such values are summed.
at::ScalarType sum_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor linear_act(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    Activation activation) {
  check_linear_act(input, weight, bias);
  if (!has_kernel(input) || !has_activation(activation)) {
    return linear_act_formula(input, weight, bias, activation);
  }
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor x = as_rows(input), b = bias.value_or(at::Tensor());
  c10::SmallVector<int64_t, 6> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = weight.size(1);
  const at::Tensor output = at::empty(sizes, input.options());
  const at::Tensor y = as_rows(output);
  if (activation == Activation::kNone || activation == Activation::kRelu) {
    gemm(x, weight, b, activation == Activation::kRelu, y);
    return output;
  }
  const auto dtype = sum_dtype(input.scalar_type());
  const at::Tensor z =
      dtype == input.scalar_type() ? y : at::empty(y.sizes(), y.options().dtype(dtype));
  gemm(x, weight, at::Tensor(), false, z);
  const at::Tensor bias_values = b.defined() ? b.contiguous() : b;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "linear_act_cuda", [&] {
        bias_act(
            y.size(0), y.size(1), data<acc_t<scalar_t>>(z), data<scalar_t>(bias_values), activation,
            mutable_data<scalar_t>(y), c10::cuda::getCurrentCUDAStream());
      });
  return output;
}

// dz = dy * act'(y) and db, its sum over the rows, in one pass; either may be undefined.
void mask_rows(
    const at::Tensor& dy, const at::Tensor& y, Activation act, const at::Tensor& dz,
    const at::Tensor& db) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, dy.scalar_type(), "linear_act_backward_cuda", [&] {
        using C = acc_t<scalar_t>;
        const int64_t rows = dy.size(0), cols = dy.size(1);
        c10::DataPtr partial;
        if (db.defined()) {
          partial = c10::cuda::CUDACachingAllocator::get()->allocate(
              mask_and_sum_partials<scalar_t>(rows, cols) * sizeof(C));
        }
        mask_and_sum<scalar_t>(
            rows, cols, data<scalar_t>(dy), dy.stride(0), data<scalar_t>(y), act,
            mutable_data<scalar_t>(dz), mutable_data<scalar_t>(db), static_cast<C*>(partial.get()),
            c10::cuda::getCurrentCUDAStream());
      });
}

Gradients linear_act_backward(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask) {
  check_linear_act_backward(grad_output, input, weight, output, activation, mask);
  if (!has_kernel(grad_output) || !has_activation(activation)) {
    return linear_act_backward_formula(grad_output, input, weight, output, activation, mask);
  }
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const auto fresh = [&](at::IntArrayRef sizes) { return at::empty(sizes, grad_output.options()); };
  const bool masks = activation != Activation::kNone;
  at::Tensor dy = as_rows(grad_output), dx, dw, db;
  const int64_t units = dy.size(1);
  if (mask[2]) {
    db = fresh({units});
  }
  const at::Tensor dz = masks && (mask[0] || mask[1]) ? fresh(dy.sizes()) : at::Tensor();
  if (dz.defined() || mask[2]) {
    if (dy.stride(1) != 1) {
      dy = dy.contiguous();
    }
    mask_rows(dy, masks ? as_rows(*output).contiguous() : at::Tensor(), activation, dz, db);
  }
  const at::Tensor& g = dz.defined() ? dz : dy;
  if (mask[0]) {
    c10::SmallVector<int64_t, 6> sizes(grad_output.sizes().begin(), grad_output.sizes().end());
    sizes.back() = weight->size(0);
    dx = fresh(sizes);
    gemm(g, weight->t(), at::Tensor(), false, as_rows(dx));
  }
  if (mask[1]) {
    const at::Tensor x = as_rows(*input);
    dw = fresh({x.size(1), units});
    gemm(x.t(), g, at::Tensor(), false, dw);
  }
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(mylayers, CUDA, m) {
  m.impl("linear_act", linear_act_kernel<linear_act>);
  m.impl("linear_act_backward", linear_act_backward_kernel<linear_act_backward>);
}

}  // namespace mylayers::cuda
