// What decides how an Autograd kernel goes on (docs/architecture.md, "The three exits").
#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <initializer_list>

#include "../has_kernel.h"

namespace mylayers {

// Exit 1: a functorch transform is active, an argument carries a forward-mode tangent, or
// there is no compiled kernel. The ATen formula then has every derivative and rule.
inline bool takes_formula(c10::ArrayRef<const at::Tensor*> args) {
  if (c10::impl::tls_local_dispatch_key_set().included_.has(
          c10::DispatchKey::FuncTorchDynamicLayerBackMode)) {
    return true;
  }
  // Asking each tensor for its tangent takes a lock each; one tells whether there can be any.
  const bool tangents = torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
  for (const at::Tensor* t : args) {
    if (t->defined() && (!has_kernel(*t) || (tangents && t->_fw_grad(/*level=*/0).defined()))) {
      return true;
    }
  }
  return false;
}

// The tensors of a call that takes lists of them, for these questions.
inline c10::SmallVector<const at::Tensor*, 16> arguments(
    const at::Tensor& first, std::initializer_list<at::TensorList> lists) {
  c10::SmallVector<const at::Tensor*, 16> all = {&first};
  for (const at::TensorList list : lists) {
    for (const at::Tensor& t : list) {
      all.push_back(&t);
    }
  }
  return all;
}

// Exit 3 (exit 2 otherwise): some argument's gradient is to be recorded.
inline bool records_gradient(c10::ArrayRef<const at::Tensor*> args) {
  if (!at::GradMode::is_enabled()) {
    return false;
  }
  for (const at::Tensor* t : args) {
    if (t->defined() && t->requires_grad()) {
      return true;
    }
  }
  return false;
}

}  // namespace mylayers
