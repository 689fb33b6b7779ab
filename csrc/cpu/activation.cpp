#include "activation.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "../linear_act.h"
#include "dtypes.h"
#include "scratch.h"

namespace mylayers::cpu {
namespace {

// Values per thread below which a second one does not pay.
constexpr int64_t kActivationGrain = 1 << 15;

// Of one thread.
template <class T>
void activate_range(int64_t count, const T* in, Activation act, T* out) {
  const auto& storage = kernels().storage<T>();
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    storage.epilogue(1, count, in, count, nullptr, act, out, count);
  } else {
    constexpr int64_t kPiece = 1 << 11;
    const Scratch<acc_t<T>> wide(std::min(kPiece, count));
    for (int64_t i = 0; i < count; i += kPiece) {
      const int64_t piece = std::min(kPiece, count - i);
      storage.pack(1, piece, in + i, piece, 1, wide.get(), piece);
      storage.epilogue(1, piece, wide.get(), piece, nullptr, act, out + i, piece);
    }
  }
}

bool is_dense(const at::Tensor& t) {
  return t.unsafeGetTensorImpl()->is_non_overlapping_and_dense_or_false();
}

}  // namespace

template <class T>
void activate(int64_t count, const T* in, Activation act, T* out) {
  at::parallel_for(0, count, kActivationGrain, [&](int64_t begin, int64_t end) {
    activate_range(end - begin, in + begin, act, out + begin);
  });
}

at::Tensor activation(const at::Tensor& x, Activation act) {
  if (!has_kernel(x)) {
    return activation_formula(x, act);
  }
  const at::Tensor in = is_dense(x) ? x : x.contiguous();
  at::Tensor out = empty_like_of(in);
  with_storage_type(x.scalar_type(), [&]<class T>(T) {
    activate(in.numel(), data<T>(in), act, mutable_data<T>(out));
  });
  return out;
}

at::Tensor activation_backward(
    const at::Tensor& grad_output, const at::Tensor& saved, Activation act) {
  if (!has_kernel(grad_output) || !has_kernel(saved) ||
      grad_output.scalar_type() != saved.scalar_type() || grad_output.sizes() != saved.sizes()) {
    return activation_backward_formula(grad_output, saved, act);
  }
  const bool alike = is_dense(saved) && grad_output.strides() == saved.strides();
  const at::Tensor grad = alike ? grad_output : grad_output.contiguous();
  const at::Tensor read = alike ? saved : saved.contiguous();
  at::Tensor out = empty_like_of(grad);
  with_storage_type(grad.scalar_type(), [&]<class T>(T) {
    const T *g = data<T>(grad), *r = data<T>(read);
    T* const dx = mutable_data<T>(out);
    at::parallel_for(0, grad.numel(), kActivationGrain, [&](int64_t begin, int64_t end) {
      kernels().storage<T>().act_backward(
          1, end - begin, g + begin, 0, r + begin, act, dx + begin, /*db=*/nullptr);
    });
  });
  return out;
}

#define INSTANTIATE(T) template void activate<T>(int64_t, const T*, Activation, T*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(half_t)
INSTANTIATE(bfloat16_t)
#undef INSTANTIATE

}  // namespace mylayers::cpu
