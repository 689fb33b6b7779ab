// Forward, loss, backward and the parameters' gradients in one call. The engine, the graph that it
// walks and the dispatcher on the way are half of a small network's training step.
#include <ATen/core/grad_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/empty_native.h>
#include <ATen/ops/huber_loss.h>
#include <ATen/ops/huber_loss_backward.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/mse_loss_backward.h>
#include <ATen/ops/nll_loss_backward.h>
#include <ATen/ops/nll_loss_forward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/smooth_l1_loss.h>
#include <ATen/ops/smooth_l1_loss_backward.h>
#include <ATen/ops/sum_cpu_dispatch.h>
#include <c10/util/irange.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "../dispatch/questions.h"
#include "../training.h"

namespace mylayers {
namespace {

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

bool takes(const Criterion& criterion, const at::Tensor& target) {
  const bool classes = criterion.kind == Criterion::Kind::kCrossEntropy;
  return !target.requires_grad() && !target.is_inference() &&
         (classes ? target.is_cpu() && target.layout() == at::kStrided &&
                        target.scalar_type() == at::kLong
                  : leads_to_cpu_kernel({&target}));
}

// What PyTorch's functions do not broadcast, convert or refuse.
bool fits(const Criterion& criterion, const at::Tensor& output, const at::Tensor& target) {
  if (criterion.kind == Criterion::Kind::kCrossEntropy) {
    return output.dim() == 2 && target.dim() == 1 && output.size(0) == target.size(0);
  }
  return output.sizes() == target.sizes() && output.scalar_type() == target.scalar_type();
}

struct Loss {
  at::Tensor value, grad_output;
};

// Values up to which a loss is computed here: ATen's functions cost more than so few.
constexpr int64_t kFew = 1 << 12;

// The mean or sum of (output - target)^2, operation by operation as ATen has it. The sum is ATen's,
// whose order of adding is its own.
template <class T>
Loss square_loss(const at::Tensor& output, const at::Tensor& target, int64_t reduction) {
  const int64_t count = output.numel();
  const bool is_mean = reduction == at::Reduction::Mean;
  const at::Tensor gradient = at::native::empty_cpu(output.sizes(), output.scalar_type());
  const at::Tensor squares = at::native::empty_cpu({count}, output.scalar_type());
  const T *y = static_cast<const T*>(output.const_data_ptr()),
          *t = static_cast<const T*>(target.const_data_ptr());
  T *g = static_cast<T*>(gradient.mutable_data_ptr()),
    *s = static_cast<T*>(squares.mutable_data_ptr());
  const T factor = static_cast<T>(is_mean ? 2.0 / static_cast<double>(count) : 2.0);
  for (int64_t i = 0; i < count; ++i) {
    const T difference = y[i] - t[i];
    s[i] = difference * difference;
    g[i] = factor * difference;
  }
  const at::Tensor value = at::cpu::sum(squares, at::IntArrayRef{}, false, std::nullopt);
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

Loss compute(const Criterion& criterion, const at::Tensor& output, const at::Tensor& target) {
  const auto [kind, reduction, constant, ignored] = criterion;
  if (kind == Criterion::Kind::kMse && is_few(output, target)) {
    return output.scalar_type() == at::kFloat ? square_loss<float>(output, target, reduction)
                                              : square_loss<double>(output, target, reduction);
  }
  const at::Tensor one = at::ones({}, output.options());
  switch (kind) {
    case Criterion::Kind::kMse:
      return {
          at::mse_loss(output, target, reduction),
          at::mse_loss_backward(one, output, target, reduction)};
    case Criterion::Kind::kSmoothL1:
      return {
          at::smooth_l1_loss(output, target, reduction, constant),
          at::smooth_l1_loss_backward(one, output, target, reduction, constant)};
    case Criterion::Kind::kHuber:
      return {
          at::huber_loss(output, target, reduction, constant),
          at::huber_loss_backward(one, output, target, reduction, constant)};
    case Criterion::Kind::kCrossEntropy:
      break;
  }
  const at::Tensor logs = at::_log_softmax(output, 1, false);
  const auto [value, weight] = at::nll_loss_forward(logs, target, {}, reduction, ignored);
  const at::Tensor grad_logs =
      at::nll_loss_backward(one, logs, target, {}, reduction, ignored, weight);
  return {value, at::_log_softmax_backward_data(grad_logs, logs, 1, output.scalar_type())};
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

}  // namespace

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
