// Forward, loss, backward and the parameters' gradients in one call. The engine, the graph that it
// walks and the dispatcher on the way are half of a small network's training step. A loss that must
// be called has a graph; the engine then walks that one, without the parameters' nodes.
#include <ATen/core/grad_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/binary_cross_entropy.h>
#include <ATen/ops/binary_cross_entropy_backward.h>
#include <ATen/ops/binary_cross_entropy_with_logits.h>
#include <ATen/ops/empty_native.h>
#include <ATen/ops/huber_loss.h>
#include <ATen/ops/huber_loss_backward.h>
#include <ATen/ops/kl_div.h>
#include <ATen/ops/l1_loss.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/mse_loss_backward.h>
#include <ATen/ops/nll_loss_backward.h>
#include <ATen/ops/nll_loss_forward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/smooth_l1_loss.h>
#include <ATen/ops/smooth_l1_loss_backward.h>
#include <ATen/ops/sum_cpu_dispatch.h>
#include <c10/util/irange.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cmath>

#include "../dispatch/questions.h"
#include "../training.h"

namespace mylayers {
namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

// Whether nothing but .grad learns of a gradient of this leaf, and takes it as it is.
bool only_accumulates(const at::Tensor& leaf) {
  namespace impl = torch::autograd::impl;
  if (!leaf.is_leaf() || leaf.grad_dtype() != leaf.scalar_type() || !impl::hooks(leaf).empty() ||
      impl::post_acc_grad_hooks(leaf)) {
    return false;
  }
  // DistributedDataParallel's hooks, for one, are the accumulator's own.
  const auto accumulator = impl::try_get_grad_accumulator(leaf);
  return !accumulator || (accumulator->pre_hooks().empty() && accumulator->post_hooks().empty());
}

// Whether its target is a class for each row.
bool has_classes(const Criterion& criterion) {
  return criterion.kind == Criterion::Kind::kCrossEntropy ||
         criterion.kind == Criterion::Kind::kNll;
}

bool takes(const Criterion& criterion, const at::Tensor& target) {
  return !target.requires_grad() && !target.is_inference() &&
         (has_classes(criterion) ? target.is_cpu() && target.layout() == at::kStrided &&
                                       target.scalar_type() == at::kLong
                                 : leads_to_cpu_kernel({&target}));
}

// What PyTorch's functions do not broadcast, convert or refuse.
bool fits(const Criterion& criterion, const at::Tensor& output, const at::Tensor& target) {
  if (has_classes(criterion)) {
    return output.dim() == 2 && target.dim() == 1 && output.size(0) == target.size(0);
  }
  return output.sizes() == target.sizes() && output.scalar_type() == target.scalar_type();
}

struct Loss {
  at::Tensor value, grad_output;
};

// Values up to which a loss is computed here: ATen's functions cost more than so few.
constexpr int64_t kFew = 1 << 12;

// The mean or sum of (output - target)^2 or |output - target|, operation by operation as ATen has
// it. The sum is ATen's, whose order of adding is its own.
template <class T>
Loss loss_of_few(
    Criterion::Kind kind, const at::Tensor& output, const at::Tensor& target, int64_t reduction) {
  const int64_t count = output.numel();
  const bool is_mean = reduction == at::Reduction::Mean;
  const at::Tensor gradient = at::native::empty_cpu(output.sizes(), output.scalar_type());
  const at::Tensor values = at::native::empty_cpu({count}, output.scalar_type());
  const T *y = static_cast<const T*>(output.const_data_ptr()),
          *t = static_cast<const T*>(target.const_data_ptr());
  T *g = static_cast<T*>(gradient.mutable_data_ptr()),
    *v = static_cast<T*>(values.mutable_data_ptr());
  if (kind == Criterion::Kind::kMse) {
    const T factor = static_cast<T>(is_mean ? 2.0 / static_cast<double>(count) : 2.0);
    for (int64_t i = 0; i < count; ++i) {
      const T difference = y[i] - t[i];
      v[i] = difference * difference;
      g[i] = factor * difference;
    }
  } else {
    const T factor = is_mean ? T(1) / static_cast<T>(count) : T(1);
    for (int64_t i = 0; i < count; ++i) {
      const T difference = y[i] - t[i];
      v[i] = std::abs(difference);
      g[i] = factor * static_cast<T>((difference > 0) - (difference < 0));
    }
  }
  const at::Tensor value = at::cpu::sum(values, at::IntArrayRef{}, false, std::nullopt);
  if (is_mean) {
    *static_cast<T*>(value.mutable_data_ptr()) /= static_cast<T>(count);
  }
  return {value, gradient};
}

bool is_few(const at::Tensor& output, const at::Tensor& target) {
  return 0 < output.numel() && output.numel() <= kFew && output.is_contiguous() &&
         target.is_contiguous() && !target.is_neg() &&
         (output.scalar_type() == at::kFloat || output.scalar_type() == at::kDouble);
}

// What a gradient of 1 is to each of the values that a mean or a sum was made of.
at::Tensor shares(const at::Tensor& one, const at::Tensor& of, int64_t reduction) {
  const at::Tensor share = reduction == Criterion::kBatchMean ? one / of.size(0) : one;
  const at::Tensor shares = share.expand(of.sizes());
  return reduction == at::Reduction::Mean ? shares / of.numel() : shares;
}

Loss kl_div_loss(
    const at::Tensor& one, const at::Tensor& output, const at::Tensor& target, int64_t reduction,
    bool of_logs) {
  const at::Tensor each = shares(one, output, reduction);
  const at::Tensor gradient = of_logs ? -(each * target.exp()) : -each * target;
  if (reduction != Criterion::kBatchMean) {
    return {at::kl_div(output, target, reduction, of_logs), gradient};
  }
  return {at::kl_div(output, target, at::Reduction::Sum, of_logs) / output.size(0), gradient};
}

Loss compute(const Criterion& criterion, const at::Tensor& output, const at::Tensor& target) {
  using Kind = Criterion::Kind;
  const auto [kind, reduction, constant, ignored] = criterion;
  if ((kind == Kind::kMse || kind == Kind::kL1) && is_few(output, target)) {
    return output.scalar_type() == at::kFloat
               ? loss_of_few<float>(kind, output, target, reduction)
               : loss_of_few<double>(kind, output, target, reduction);
  }
  const at::Tensor one = at::ones({}, output.options());
  switch (kind) {
    case Kind::kMse:
      return {
          at::mse_loss(output, target, reduction),
          at::mse_loss_backward(one, output, target, reduction)};
    case Kind::kSmoothL1:
      return {
          at::smooth_l1_loss(output, target, reduction, constant),
          at::smooth_l1_loss_backward(one, output, target, reduction, constant)};
    case Kind::kHuber:
      return {
          at::huber_loss(output, target, reduction, constant),
          at::huber_loss_backward(one, output, target, reduction, constant)};
    case Kind::kL1:
      return {
          at::l1_loss(output, target, reduction),
          shares(one, output, reduction) * (output - target).sgn()};
    case Kind::kBinaryCrossEntropy:
      return {
          at::binary_cross_entropy(output, target, {}, reduction),
          at::binary_cross_entropy_backward(one, output, target, {}, reduction)};
    case Kind::kBinaryCrossEntropyWithLogits: {
      at::Tensor gradient = output.sigmoid().sub_(target);
      if (reduction == at::Reduction::Mean) {
        gradient.div_(output.numel());
      }
      return {at::binary_cross_entropy_with_logits(output, target, {}, {}, reduction), gradient};
    }
    case Kind::kKlDiv:
    case Kind::kKlDivOfLogs:
      return kl_div_loss(one, output, target, reduction, kind == Kind::kKlDivOfLogs);
    case Kind::kCrossEntropy:
    case Kind::kNll:
      break;
  }
  const at::Tensor logs = kind == Kind::kNll ? output : at::_log_softmax(output, 1, false);
  const auto [value, weight] = at::nll_loss_forward(logs, target, {}, reduction, ignored);
  const at::Tensor grad_logs =
      at::nll_loss_backward(one, logs, target, {}, reduction, ignored, weight);
  return {
      value, kind == Kind::kNll
                 ? grad_logs
                 : at::_log_softmax_backward_data(grad_logs, logs, 1, output.scalar_type())};
}

// As AccumulateGrad does where it need not add: the gradient itself, if nothing else holds it.
void accumulate(const at::Tensor& leaf, at::Tensor gradient) {
  at::Tensor& there = leaf.mutable_grad();
  if (!there.defined() && gradient.use_count() == 1 && gradient.storage().use_count() == 1 &&
      leaf.is_non_overlapping_and_dense() && gradient.sizes() == leaf.sizes() &&
      gradient.strides() == leaf.strides()) {
    there = std::move(gradient);
    return;
  }
  variable_list gradients;
  gradients.push_back(std::move(gradient));
  (*torch::autograd::impl::grad_accumulator(leaf))(std::move(gradients));
}

// ---- any loss ----------------------------------------------------------------------------------

bool has_hooks(Node& node) {
  return !node.pre_hooks().empty() || !node.post_hooks().empty() ||
         !node.tensor_pre_hooks().empty() || !node.retains_grad_hooks().empty();
}

// Whether all gradients go from here to the one node, without hooks on their way.
bool leads_only_to(const Node& end, Node* from) {
  constexpr size_t kMany = 64;  // whose engine is no longer what takes the time
  c10::SmallVector<Node*, kMany> nodes = {from};
  for (size_t i = 0; i < nodes.size(); ++i) {
    Node& node = *nodes[i];
    if (has_hooks(node)) {
      return false;
    }
    bool goes_on = &node == &end;
    const size_t edges = goes_on ? 0 : node.num_outputs();
    for (size_t e = 0; e < edges; ++e) {
      Node* next = node.next_edge(e).function.get();
      if (next == nullptr) {
        continue;
      }
      goes_on = true;
      if (std::find(nodes.begin(), nodes.end(), next) == nodes.end()) {
        if (nodes.size() == kMany) {
          return false;
        }
        nodes.push_back(next);
      }
    }
    if (!goes_on) {
      return false;  // a leaf of the loss's own
    }
  }
  return std::find(nodes.begin() + 1, nodes.end(), &end) != nodes.end();
}

// The leaves that the node's gradients go to, undefined where there is none; whether they are
// leaves, none twice, that only take them.
bool find_leaves(const Node& node, variable_list& leaves) {
  for (const torch::autograd::Edge& edge : node.next_edges()) {
    if (!edge.is_valid()) {
      leaves.emplace_back();
      continue;
    }
    const auto* accumulator =
        dynamic_cast<const torch::autograd::AccumulateGrad*>(edge.function.get());
    if (accumulator == nullptr) {
      return false;
    }
    const at::Tensor& leaf = accumulator->variable;
    const auto is_leaf = [&](const at::Tensor& other) { return other.is_same(leaf); };
    if (!leaf.defined() || !leaf.requires_grad() || !only_accumulates(leaf) ||
        std::any_of(leaves.begin(), leaves.end(), is_leaf)) {
      return false;
    }
    leaves.push_back(leaf);
  }
  return true;
}

}  // namespace

bool backward_to(const torch::autograd::Edge& node, const at::Tensor& loss) {
  if (!node.is_valid() || !loss.requires_grad() || loss.is_leaf() || loss.sym_numel() != 1 ||
      !at::isFloatingType(loss.scalar_type()) || !loss.is_cpu() || is_graph_watched() ||
      shortcut_of({&loss}) == Shortcut::kNone) {
    return false;
  }
  Node& end = *node.function;
  variable_list leaves;
  if (!leads_only_to(end, loss.grad_fn().get()) || !find_leaves(end, leaves)) {
    return false;
  }
  variable_list given(end.num_inputs());
  given[node.input_nr] = torch::autograd::Engine::get_default_engine().execute(
      {torch::autograd::impl::gradient_edge(loss)},
      {at::ones_like(loss, {}, at::MemoryFormat::Preserve)}, /*keep_graph=*/false,
      /*create_graph=*/false, /*accumulate_grad=*/false, {node})[0];
  const at::NoGradGuard gradients_have_none;
  variable_list gradients = end(std::move(given));
  end.release_variables();
  for (const auto i : c10::irange(leaves.size())) {
    if (leaves[i].defined() && gradients[i].defined()) {
      accumulate(leaves[i], std::move(gradients[i]));
    }
  }
  return true;
}

at::Tensor forward_backward(
    const at::Tensor& input, at::TensorList parameters, const Program& program,
    const Criterion& criterion, const at::Tensor& target) {
  if (!at::GradMode::is_enabled() || is_graph_watched() || input.requires_grad() ||
      input.is_inference()) {
    return {};
  }
  GradientsAskedFor asked = {false};
  for (const auto i : c10::irange(parameters.size())) {
    const at::Tensor& parameter = parameters[i];
    const auto is_this = [&](const at::Tensor& other) { return other.is_same(parameter); };
    const bool repeated = std::any_of(parameters.begin(), parameters.begin() + i, is_this);
    asked.push_back(parameter.requires_grad());
    if (asked.back() && (repeated || !only_accumulates(parameter))) {
      return {};
    }
  }
  if (std::none_of(asked.begin(), asked.end(), [](bool wanted) { return wanted; })) {
    return {};
  }

  Loss loss;
  std::vector<at::Tensor> gradients;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    if (!leads_to_cpu_kernel(arguments(input, {parameters})) || !takes(criterion, target)) {
      return {};
    }
    // The gradient of the output; undefined where the loss is not computed here.
    const auto gradient_of = [&](const at::Tensor& output) {
      if (fits(criterion, output, target)) {
        loss = compute(criterion, output, target);
      }
      return loss.grad_output;
    };
    if (cpu::is_small_chain(input, parameters, program)) {
      gradients = cpu::small_chain_gradients(input, parameters, program, asked, gradient_of);
    } else {
      const auto outputs = cpu::sequential_outputs(input, parameters, program);
      variable_list grad_outputs(outputs.size());
      grad_outputs.back() = gradient_of(outputs.back());
      if (loss.value.defined()) {
        gradients = cpu::sequential_backward(
            grad_outputs, input, outputs, parameters, flattened_sizes(input, outputs, program),
            program, asked);
      }
    }
  }
  if (!loss.value.defined()) {
    return {};
  }
  const at::NoGradGuard gradients_have_none;
  for (size_t i = 0, next = 0; i < parameters.size(); ++i) {
    if (asked[1 + i]) {
      accumulate(parameters[i], std::move(gradients[next++]));
    }
  }
  return loss.value;
}

}  // namespace mylayers
