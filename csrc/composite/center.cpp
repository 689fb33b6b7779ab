// center in ATen's own operators: every device, dtype, layout and transform that has no
// compiled kernel; and the shape of its result, for the Meta device.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mean.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "../center.h"

namespace mylayers {
namespace {

at::Tensor center_meta(const at::Tensor& input, at::OptionalIntArrayRef dim) {
  if (!at::isFloatingType(input.scalar_type())) {
    return center_formula(input, dim);
  }
  center_dims(input, dim);
  return at::empty_like(input);
}

}  // namespace

at::Tensor center_formula(const at::Tensor& input, at::OptionalIntArrayRef dim) {
  // A nested tensor's dimensions are ATen's to judge.
  if (!input.is_nested()) {
    center_dims(input, dim);
  }
  return dim.has_value() ? input - at::mean(input, dim, /*keepdim=*/true) : input - at::mean(input);
}

TORCH_LIBRARY_IMPL(mylayers, CompositeExplicitAutograd, m) { m.impl("center", center_formula); }
// Not among the backends of the key above.
TORCH_LIBRARY_IMPL(mylayers, NestedTensorCPU, m) { m.impl("center", center_formula); }
TORCH_LIBRARY_IMPL(mylayers, NestedTensorCUDA, m) { m.impl("center", center_formula); }
TORCH_LIBRARY_IMPL(mylayers, FuncTorchBatched, m) { m.impl("center", center_formula); }
TORCH_LIBRARY_IMPL(mylayers, Meta, m) { m.impl("center", center_meta); }

}  // namespace mylayers
