// center on CUDA: x - mean(x) over all of x or over some dimensions.
#include "../center.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../dispatch/questions.h"
#include "kernels.h"

namespace mylayers::cuda {
namespace {

at::Tensor center(const at::Tensor& input, at::OptionalIntArrayRef dim) {
  const auto dims = center_dims(input, dim);
  if (!has_kernel(input)) {
    return center_formula(input, dim);
  }
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor output = at::empty_like(input);
  if (input.numel() == 0) {
    return output;
  }
  const auto sizes =
      input.is_non_overlapping_and_dense() ? center_sizes(input, dims) : std::nullopt;
  if (!sizes.has_value()) {
    return center_moved(input, dims, output, center);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "center_cuda", [&] {
        subtract_mean<scalar_t>(
            *sizes, static_cast<const scalar_t*>(input.const_data_ptr()),
            static_cast<scalar_t*>(output.mutable_data_ptr()), c10::cuda::getCurrentCUDAStream());
      });
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(mylayers, CUDA, m) { m.impl("center", center); }

}  // namespace mylayers::cuda
