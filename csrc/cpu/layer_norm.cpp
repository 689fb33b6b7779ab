// layer_norm on the CPU: tensors to rows.
//
// Sums over rows are cut into chunks of fixed size and these added in order, so that the threads
// change no bit of a gradient.
#include "../layer_norm.h"

#include <ATen/Parallel.h>
#include <c10/util/irange.h>

#include <algorithm>

#include "ceil_div.h"
#include "dtypes.h"
#include "scratch.h"

namespace mylayers::cpu {
namespace {

// Values per thread below which a second one does not pay.
constexpr int64_t kNormGrain = 1 << 14;
// Rows whose sums are added up one after another.
constexpr int64_t kNormRows = 64;

struct Sizes {
  int64_t rows = 1, cols = 1;
};

Sizes sizes_of(const at::Tensor& x, const LayerNorm& norm) {
  Sizes sizes;
  for (const int64_t size : norm.sizes) {
    sizes.cols *= size;
  }
  sizes.rows = sizes.cols == 0 ? 0 : x.numel() / sizes.cols;
  return sizes;
}

// Whether the kernels take them. ATen takes parameters of another dtype, too, and refuses in its
// own words what does not fit.
bool is_fitting_parameter(
    const at::Tensor& x, const OptionalTensor& parameter, const LayerNorm& norm) {
  return !parameter.has_value() ||
         (parameter->scalar_type() == x.scalar_type() && parameter->is_cpu() &&
          has_kernel(*parameter) && parameter->sizes() == at::IntArrayRef(norm.sizes));
}
bool is_fitting_input(const at::Tensor& x, const LayerNorm& norm) {
  return has_kernel(x) && x.dim() >= static_cast<int64_t>(norm.sizes.size()) &&
         x.sizes().slice(x.dim() - norm.sizes.size()) == at::IntArrayRef(norm.sizes);
}

template <class T>
const T* values_of(const at::Tensor& contiguous) {
  return contiguous.defined() ? data<T>(contiguous) : nullptr;
}
at::Tensor contiguous(const OptionalTensor& t) { return t ? t->contiguous() : at::Tensor(); }

}  // namespace

at::Tensor layer_norm(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const LayerNorm& norm) {
  if (!is_fitting_input(input, norm) || !is_fitting_parameter(input, weight, norm) ||
      !is_fitting_parameter(input, bias, norm)) {
    return layer_norm_by_aten(input, weight, bias, norm);
  }
  const at::Tensor x = input.contiguous(), w = contiguous(weight), b = contiguous(bias);
  at::Tensor out = empty_like_of(x);
  const auto [rows, cols] = sizes_of(x, norm);
  with_storage_type(x.scalar_type(), [&, cols = cols, rows = rows]<class T>(T) {
    const T* const from = data<T>(x);
    T* const to = mutable_data<T>(out);
    at::parallel_for(
        0, rows, std::max<int64_t>(1, kNormGrain / std::max<int64_t>(1, cols)),
        [&](int64_t begin, int64_t end) {
          kernels().storage<T>().layer_norm(
              end - begin, cols, from + begin * cols, values_of<T>(w), values_of<T>(b),
              norm.epsilon, to + begin * cols);
        });
  });
  return out;
}

Gradients layer_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const LayerNorm& norm, GradientMask mask) {
  if (!is_fitting_input(input, norm) || !is_fitting_parameter(input, weight, norm) ||
      grad_output.scalar_type() != input.scalar_type() || grad_output.sizes() != input.sizes() ||
      !has_kernel(grad_output)) {
    return layer_norm_backward_by_aten(grad_output, input, weight, norm, mask);
  }
  const at::Tensor grad = grad_output.contiguous(), x = input.contiguous();
  const at::Tensor w = contiguous(weight);
  const auto [rows, cols] = sizes_of(x, norm);
  Gradients gradients;
  auto& [dx, dw, db] = gradients;
  if (mask[0]) {
    dx = empty_like_of(x);
  }
  if (mask[1]) {
    dw = empty_like_of(w);
  }
  if (mask[2]) {
    db = empty_like_of(w);
  }
  with_storage_type(x.scalar_type(), [&, cols = cols, rows = rows]<class T>(T) {
    using C = acc_t<T>;
    const T *const dy = data<T>(grad), *const from = data<T>(x);
    T* const to = mask[0] ? mutable_data<T>(dx) : nullptr;
    const int64_t chunks = ceil_div(rows, kNormRows), per_chunk = (mask[1] + mask[2]) * cols;
    const Scratch<C> sums(std::max<int64_t>(1, chunks) * per_chunk, C(0));
    at::parallel_for(
        0, chunks, std::max<int64_t>(1, kNormGrain / std::max<int64_t>(1, kNormRows * cols)),
        [&](int64_t begin, int64_t end) {
          for (const int64_t chunk : c10::irange(begin, end)) {
            const int64_t first = chunk * kNormRows, at = first * cols;
            C* const own = sums.get() + chunk * per_chunk;
            kernels().storage<T>().layer_norm_backward(
                std::min(kNormRows, rows - first), cols, dy + at, from + at, values_of<T>(w),
                norm.epsilon, to == nullptr ? nullptr : to + at, mask[1] ? own : nullptr,
                mask[2] ? own + mask[1] * cols : nullptr);
          }
        });
    for (const int64_t chunk : c10::irange(int64_t{1}, chunks)) {
      for (const int64_t j : c10::irange(per_chunk)) {
        sums[j] += sums[chunk * per_chunk + j];
      }
    }
    const auto round = [&](const at::Tensor& made, const C* from_sums) {
      kernels().storage<T>().epilogue(
          1, cols, from_sums, cols, nullptr, Activation::kNone, mutable_data<T>(made), cols);
    };
    if (mask[1]) {
      round(dw, sums.get());
    }
    if (mask[2]) {
      round(db, sums.get() + mask[1] * cols);
    }
  });
  return gradients;
}

}  // namespace mylayers::cpu
