// What decides how a call goes on: to the ATen formula, to a compiled kernel, or to one in a node
// of the graph (docs/architecture.md, "The three exits"); and whether through the dispatcher.
#pragma once

#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <initializer_list>

namespace mylayers {

// Whether its memory has all of its elements. Who shards a model takes the memory of parameters
// away while they are not in use (untyped_storage().resize_(0)), and leaves them their sizes.
inline bool has_memory(const at::Tensor& t) {
  const at::TensorImpl& impl = *t.unsafeGetTensorImpl();
  if (!impl.has_storage() || impl.layout() != at::kStrided || t.is_nested() ||
      impl.has_symbolic_sizes_strides()) {
    return true;
  }
  const auto bytes = impl.unsafe_storage().sym_nbytes().maybe_as_int();
  if (!bytes.has_value()) {
    return true;
  }
  const at::IntArrayRef sizes = impl.sizes(), strides = impl.strides();
  int64_t last = impl.storage_offset();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) {
      return true;
    }
    last += (sizes[d] - 1) * strides[d];
  }
  return (last + 1) * static_cast<int64_t>(impl.itemsize()) <= *bytes;
}

// Whether the compiled kernels take it; all others take the ATen formula.
inline bool has_kernel(const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  return t.layout() == at::kStrided && !t.is_nested() &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
          dtype == at::kBFloat16) &&
         has_memory(t);
}

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

// Where the dispatcher, and the Autograd kernel behind it, would lead dense CPU tensors while no
// mode, transform, autocast, tracer or profiler would like to see the call. A small eager call
// notices the two hops (docs/lab, constants).
enum class Shortcut {
  kNone,      // the dispatcher must be asked
  kKernel,    // exit 2: to the CPU kernel
  kRecorded,  // exit 3: to the CPU kernel, in a node of the graph
};

inline Shortcut shortcut_of(c10::ArrayRef<const at::Tensor*> args) {
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
  if (!kPlain.has_all(keys) || !keys.has(DispatchKey::CPU) || at::hasCallbacks() ||
      takes_formula(args)) {
    return Shortcut::kNone;
  }
  return keys.has(DispatchKey::AutogradCPU) && records_gradient(args) ? Shortcut::kRecorded
                                                                      : Shortcut::kKernel;
}

inline bool leads_to_cpu_kernel(c10::ArrayRef<const at::Tensor*> args) {
  return shortcut_of(args) == Shortcut::kKernel;
}

// Whether Python code sees the nodes of a graph, or what they save, as they are made.
inline bool is_graph_watched() {
  return torch::autograd::AnomalyMode::is_enabled() ||
         !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}

// Whether a call may run Python code on its way: that of a mode, or of who watches the graph.
inline bool may_run_python(Shortcut shortcut) {
  return shortcut == Shortcut::kNone || (shortcut == Shortcut::kRecorded && is_graph_watched());
}

}  // namespace mylayers
