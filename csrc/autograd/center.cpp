// The gradient of center. P = I - 11'/n is symmetric, so the gradient of P x is P applied
// to the incoming gradient: center is its own backward, at every order.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../center.h"
#include "../dispatch/questions.h"

namespace mylayers {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Center : torch::autograd::Function<Center> {
  static constexpr bool is_traceable = true;  // compiled autograd may trace backward

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, at::OptionalIntArrayRef dim,
      CenterFunction* kernel) {
    ctx->set_materialize_grads(false);
    if (dim.has_value()) {
      ctx->saved_data["dim"] = *dim;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    return kernel(input, dim);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) {  // no gradient arrived: none goes on, not zeros
      return variable_list(3);
    }
    const auto dim = ctx->saved_data.find("dim");
    if (dim == ctx->saved_data.end()) {
      return {center(grads[0], std::nullopt), at::Tensor(), at::Tensor()};
    }
    return {center(grads[0], dim->second.toIntVector()), at::Tensor(), at::Tensor()};
  }
};

at::Tensor center_autograd(const at::Tensor& input, at::OptionalIntArrayRef dim) {
  if (takes_formula({&input})) {
    return center_formula(input, dim);
  }
  if (records_gradient({&input})) {
    return record_center(input, dim, dispatch_center);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return dispatch_center(input, dim);
}

TORCH_LIBRARY_IMPL(mylayers, Autograd, m) { m.impl("center", center_autograd); }

}  // namespace

at::Tensor record_center(
    const at::Tensor& input, at::OptionalIntArrayRef dim, CenterFunction* kernel) {
  return Center::apply(input, dim, kernel);
}

}  // namespace mylayers
