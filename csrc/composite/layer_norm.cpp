// layer_norm by ATen's kernels, and in single operations.
//
// ATen's own gradient takes the mean and the deviation that were saved for constants: gradients of
// third and higher order are wrong, and so are nested tangents. So wherever somebody follows what
// is computed, it is computed in single operations.
#include "../layer_norm.h"

#include <ATen/ops/layer_norm.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/sum.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <numeric>

#include "../dispatch/questions.h"

namespace mylayers {
namespace {

using Dims = c10::SmallVector<int64_t, 6>;

bool is_followed(const at::Tensor& input, at::TensorList others) {
  const auto args = arguments(input, {others});
  return std::all_of(
             args.begin(), args.end(),
             [](const at::Tensor* t) { return !t->defined() || has_kernel(*t); }) &&
         (takes_formula(args) || records_gradient(args));
}

at::Tensor or_undefined(const OptionalTensor& t) { return t.value_or(at::Tensor()); }

// 16 bits would lose what is left of a sum.
at::Tensor widened(const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  return dtype == at::kHalf || dtype == at::kBFloat16 ? t.to(at::kFloat) : t;
}

// Single operations would broadcast what layer_norm refuses.
void check_sizes(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const LayerNorm& norm) {
  const auto have_sizes = [&](const at::Tensor& t) {
    const int64_t rank = static_cast<int64_t>(norm.sizes.size());
    bool same = t.dim() >= rank;
    for (int64_t d = 0; same && d < rank; ++d) {
      same = t.sym_size(t.dim() - rank + d) == norm.sizes[d];
    }
    return same;
  };
  const at::IntArrayRef sizes = norm.sizes;
  TORCH_CHECK(
      have_sizes(input), "sequential: layer_norm must have an input whose last sizes are ", sizes,
      "; got ", input.sym_sizes());
  for (const auto& [name, given] : {std::pair("weight", &weight), std::pair("bias", &bias)}) {
    const bool same =
        !given->has_value() ||
        ((*given)->dim() == static_cast<int64_t>(sizes.size()) && have_sizes(**given));
    TORCH_CHECK(
        same, "sequential: ", name, " of layer_norm must have sizes ", sizes, "; got ",
        (*given)->sym_sizes());
  }
}

Dims dims_between(int64_t first, int64_t last) {
  Dims dims(last - first);
  std::iota(dims.begin(), dims.end(), first);
  return dims;
}
Dims normalised_dims(const at::Tensor& x, const LayerNorm& norm) {
  return dims_between(x.dim() - static_cast<int64_t>(norm.sizes.size()), x.dim());
}

struct Normalised {
  at::Tensor values;   // of mean 0 and variance 1
  at::Tensor inverse;  // of the deviation that they were divided by
};

Normalised normalised(const at::Tensor& x, const LayerNorm& norm) {
  const Dims dims = normalised_dims(x, norm);
  const auto centered_of = [&](const at::Tensor& t) { return t - t.mean(dims, /*keepdim=*/true); };
  // Twice: a mean far from zero is rounded to few digits of what is left.
  const at::Tensor centered = centered_of(centered_of(x));
  const at::Tensor inverse =
      ((centered * centered).mean(dims, /*keepdim=*/true) + norm.epsilon).rsqrt();
  return {centered * inverse, inverse};
}

// With those of weight and bias that are asked for, as plain sums over rows: ATen's own add up what
// each thread has.
Gradients with_parameters(
    at::Tensor of_input, const at::Tensor& grad, const at::Tensor& values,
    const OptionalTensor& weight, const LayerNorm& norm, GradientMask mask) {
  const auto rows = dims_between(0, grad.dim() - static_cast<int64_t>(norm.sizes.size()));
  const auto over_rows = [&](const at::Tensor& of_rows) {
    return (rows.empty() ? of_rows : of_rows.sum(rows)).to(weight->scalar_type());
  };
  return {
      std::move(of_input), mask[1] ? over_rows(grad * values) : at::Tensor(),
      mask[2] ? over_rows(grad) : at::Tensor()};
}

}  // namespace

at::Tensor layer_norm_by_aten(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const LayerNorm& norm) {
  return at::layer_norm(input, norm.sizes, weight, bias, norm.epsilon);
}

at::Tensor layer_norm_formula(
    const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const LayerNorm& norm) {
  if (!is_followed(input, {or_undefined(weight), or_undefined(bias)})) {
    return layer_norm_by_aten(input, weight, bias, norm);
  }
  check_sizes(input, weight, bias, norm);
  at::Tensor y = normalised(widened(input), norm).values;
  if (weight.has_value()) {
    y = y * widened(*weight);
  }
  if (bias.has_value()) {
    y = y + widened(*bias);
  }
  return y.to(input.scalar_type());
}

Gradients layer_norm_backward_by_aten(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const LayerNorm& norm, GradientMask mask) {
  // Of 16-bit values ATen keeps the mean and the deviation rounded to 16 bits.
  const at::Tensor x = widened(input), grad = widened(grad_output).contiguous();
  const auto [values, mean, inverse] =
      at::native_layer_norm(x, norm.sizes, std::nullopt, std::nullopt, norm.epsilon);
  at::Tensor of_input;
  if (mask[0]) {
    const OptionalTensor wide = weight.has_value() ? OptionalTensor(widened(*weight)) : weight;
    const auto wide_gradients = at::native_layer_norm_backward(
        grad, x, norm.sizes, mean, inverse, wide, std::nullopt, {true, false, false});
    of_input = std::get<0>(wide_gradients).to(input.scalar_type());
  }
  return with_parameters(std::move(of_input), grad, values, weight, norm, mask);
}

Gradients layer_norm_backward_formula(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight,
    const LayerNorm& norm, GradientMask mask) {
  if (!is_followed(grad_output, {input, or_undefined(weight)})) {
    return layer_norm_backward_by_aten(grad_output, input, weight, norm, mask);
  }
  const at::Tensor x = widened(input), grad = widened(grad_output);
  const Dims dims = normalised_dims(x, norm);
  const Normalised of_x = normalised(x, norm);
  at::Tensor of_input;
  if (mask[0]) {
    const at::Tensor g = weight.has_value() ? grad * widened(*weight) : grad;
    const at::Tensor slope = (g * of_x.values).mean(dims, /*keepdim=*/true);
    const at::Tensor wide =
        (g - g.mean(dims, /*keepdim=*/true) - of_x.values * slope) * of_x.inverse;
    of_input = wide.to(input.scalar_type());
  }
  return with_parameters(std::move(of_input), grad, of_x.values, weight, norm, mask);
}

}  // namespace mylayers
