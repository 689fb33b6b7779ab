// Whether a call may skip the dispatcher (docs/decisions.md, "Calls that nobody watches").
#pragma once

#include <ATen/record_function.h>

#include "autograd/exits.h"

namespace mylayers {

// Whether the dispatcher would do nothing but hand these arguments to the CPU kernel: dense CPU
// tensors, no gradient to record, and no mode, transform, autocast, tracer or profiler that
// would like to see the call. A small eager call notices its two hops (docs/lab, constants).
inline bool leads_to_cpu_kernel(c10::ArrayRef<const at::Tensor*> args) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kPlain(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView,
       DispatchKey::BackendSelect});
  const auto modes = c10::impl::tls_local_dispatch_key_set();
  c10::DispatchKeySet keys = modes.included_;
  for (const at::Tensor* t : args) {
    if (t->defined()) {
      keys = keys | t->key_set();
    }
  }
  keys = keys - modes.excluded_;
  const bool autograd = keys.has(DispatchKey::AutogradCPU);
  return kPlain.has_all(keys) && keys.has(DispatchKey::CPU) && !takes_formula(args) &&
         !(autograd && records_gradient(args)) && !at::hasCallbacks();
}

}  // namespace mylayers
