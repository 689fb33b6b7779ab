// linear_act on the CPU: forward and its three gradients.
#include "../linear_act.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "dtypes.h"
#include "gemm.h"
#include "linear_gradients.h"
#include "matrices.h"
#include "scratch.h"

namespace mylayers {
namespace cpu {
namespace {

// Rows whose bias gradient is one partial sum, on one thread.
constexpr int64_t kRowChunk = 256;
// Elements per thread below which a second thread does not pay.
constexpr int64_t kActBackwardGrain = 1 << 15;

}  // namespace

at::Tensor linear_act(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    Activation activation) {
  check_linear_act(input, weight, bias);
  if (!has_kernel(input)) {
    return linear_act_formula(input, weight, bias, activation);
  }
  const Rows x(input);
  c10::SmallVector<int64_t, 6> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = weight.size(1);
  const bool has_bias = bias.has_value() && bias->defined();
  const at::Tensor none;
  const auto b = (has_bias ? *bias : none).expect_contiguous();
  const at::Tensor output = empty_like_of(input, sizes);
  with_storage_type(input.scalar_type(), [&]<class T>(T) {
    gemm<T>(
        x.count, weight.size(1), x.cols, x.matrix<T>(), matrix<T>(weight),
        has_bias ? data<T>(*b) : nullptr, activation, mutable_data<T>(output));
  });
  return output;
}

namespace {

// dz (rows, cols) contiguous = dy * act'(y), and db = its column sums, in one pass; either may
// be null. Row chunks are of fixed size and their sums are added in order.
template <class T>
void act_backward_and_sum(
    int64_t rows, int64_t cols, Matrix<T> dy, const T* y, Activation act, T* dz, T* db) {
  using C = acc_t<T>;
  const int64_t chunks = (rows + kRowChunk - 1) / kRowChunk;
  const Scratch<C> partial(db ? chunks * cols : 0, C{});
  const auto& storage = kernels().storage<T>();
  const int64_t grain =
      std::max<int64_t>(1, kActBackwardGrain / (kRowChunk * std::max<int64_t>(cols, 1)));
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t i = s * kRowChunk;
      storage.act_backward(
          std::min(kRowChunk, rows - i), cols, dy.at(i, 0).data, dy.row, y ? y + i * cols : nullptr,
          act, dz ? dz + i * cols : nullptr, db ? partial.get() + s * cols : nullptr);
    }
  });
  if (db) {
    const Scratch<C> total(cols, C{});
    for (int64_t s = 0; s < chunks; ++s) {
      for (int64_t j = 0; j < cols; ++j) {
        total[j] += partial[s * cols + j];
      }
    }
    storage.epilogue(1, cols, total.get(), cols, nullptr, Activation::kNone, db, cols);
  }
}

}  // namespace

template <class T>
void linear_gradients(const LinearGradients<T>& of) {
  const auto [rows, in_units, units] = std::tuple(of.rows, of.in_units, of.units);
  const bool activated = of.activation != Activation::kNone;
  const bool keeps_dz = activated && (of.dx || of.dw);
  const Scratch<T> dz(keeps_dz ? rows * units : 0);
  if (keeps_dz || of.db) {
    act_backward_and_sum<T>(
        rows, units, of.dy, activated ? of.y : nullptr, of.activation,
        keeps_dz ? dz.get() : nullptr, of.db);
  }
  const Matrix<T> g = keeps_dz ? Matrix<T>{dz.get(), units, 1} : of.dy;
  if (of.dx) {
    gemm<T>(rows, in_units, units, g, of.weight.transposed(), nullptr, Activation::kNone, of.dx);
  }
  if (of.dw && of.transposed) {  // the same products, added in the same order
    gemm_long<T>(units, in_units, rows, g.transposed(), of.x, of.dw);
  } else if (of.dw) {
    gemm_long<T>(in_units, units, rows, of.x.transposed(), g, of.dw);
  }
}

template void linear_gradients<float>(const LinearGradients<float>&);
template void linear_gradients<double>(const LinearGradients<double>&);

Gradients linear_act_gradients(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation act, GradientMask mask, bool transposed) {
  check_linear_act_backward(grad_output, input, weight, output, act, mask, transposed);
  at::Tensor dx, dw, db;
  with_storage_type(grad_output.scalar_type(), [&]<class T>(T) {
    const auto grad = grad_output.stride(-1) == 1
                          ? c10::MaybeOwned<at::Tensor>::borrowed(grad_output)
                          : grad_output.expect_contiguous();
    const Rows dy(*grad);
    const int64_t rows = dy.count, units = dy.cols;
    const bool activated = act != Activation::kNone;
    const auto allocate_dx = [&] {
      c10::SmallVector<int64_t, 6> sizes(grad_output.sizes().begin(), grad_output.sizes().end());
      sizes.back() = weight->size(transposed ? 1 : 0);
      dx = empty_like_of(grad_output, sizes);
    };
    const auto allocate_dw = [&] {
      const int64_t in_units = input->size(-1);
      dw = transposed ? empty_like_of(grad_output, {units, in_units})
                      : empty_like_of(grad_output, {in_units, units});
    };
    // The largest first: malloc may cut a smaller one from the memory of the last step's gradients,
    // which is still in cache. The larger then lies in memory that is not. [lab: constants]
    const bool dx_first = rows > units;
    if (mask[0] && dx_first) {
      allocate_dx();
    }
    if (mask[1]) {
      allocate_dw();
    }
    if (mask[0] && !dx_first) {
      allocate_dx();
    }
    const at::Tensor none;
    const auto y = (activated ? *output : none).expect_contiguous();
    if (mask[2]) {
      db = empty_like_of(grad_output, {units});
    }
    LinearGradients<T> of = {rows, 0, units, dy.matrix<T>(), activated ? data<T>(*y) : nullptr,
                             act};
    of.transposed = transposed;
    of.db = mask[2] ? mutable_data<T>(db) : nullptr;
    if (mask[0]) {
      of.in_units = dx.size(-1);
      const Matrix<T> w = matrix<T>(*weight);
      of.weight = transposed ? w.transposed() : w;
      of.dx = mutable_data<T>(dx);
    }
    std::optional<Rows> x;
    if (mask[1]) {
      x.emplace(*input);
      of.in_units = x->cols;
      of.x = x->matrix<T>();
      of.dw = mutable_data<T>(dw);
    }
    linear_gradients<T>(of);
  });
  return {dx, dw, db};
}

Gradients linear_act_backward(
    const at::Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
    const OptionalTensor& output, Activation activation, GradientMask mask) {
  if (!has_kernel(grad_output)) {
    return linear_act_backward_formula(grad_output, input, weight, output, activation, mask);
  }
  return linear_act_gradients(
      grad_output, input, weight, output, activation, mask, /*transposed=*/false);
}

TORCH_LIBRARY_IMPL(mylayers, CPU, m) {
  m.impl("linear_act", linear_act_kernel<linear_act>);
  m.impl("linear_act_backward", linear_act_backward_kernel<linear_act_backward>);
}

}  // namespace cpu
}  // namespace mylayers
