// What decides how an Autograd kernel goes on (docs/design.md, "C++ autograd").
#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <initializer_list>

#include "../has_kernel.h"

namespace mylayers {

// Exit 1: a functorch transform is active, an argument carries a forward-mode tangent, or
// there is no compiled kernel. The ATen formula then has every derivative and rule.
inline bool takes_formula(std::initializer_list<const at::Tensor*> args) {
  if (c10::impl::tls_local_dispatch_key_set().included_.has(
          c10::DispatchKey::FuncTorchDynamicLayerBackMode)) {
    return true;
  }
  for (const at::Tensor* t : args) {
    if (t->defined() && (!has_kernel(*t) || t->_fw_grad(/*level=*/0).defined())) {
      return true;
    }
  }
  return false;
}

// Exit 3 (exit 2 otherwise): some argument's gradient is to be recorded.
inline bool records_gradient(std::initializer_list<const at::Tensor*> args) {
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
