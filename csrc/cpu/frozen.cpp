// Frozen on the CPU: weights packed once, and products whose plans are made beforehand.
#include "../frozen.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/DispatchKeySet.h>

#include <deque>
#include <variant>

#include "dtypes.h"
#include "gemm_aten.h"
#include "layers.h"

namespace mylayers {
namespace {

// Rows up to which products have their plans made beforehand.
constexpr int64_t kPlannedRows = 32;

// Weights are packed as (in_units, units), of which kernels of few rows read whole vectors. But not
// where products are PyTorch's, whose bits depend on the layout.
bool packs_weights() { return !cpu::has_aten_products(); }

std::string packed_text(std::string_view program) {
  std::string text(program);
  constexpr std::string_view kTransposed = "linear_t", kPlain = "linear";
  for (size_t at = 0; packs_weights() && (at = text.find(kTransposed, at)) != std::string::npos;) {
    text.replace(at, kTransposed.size(), kPlain);
  }
  return text;
}

at::Tensor packed(const at::Tensor& value, bool transposed) {
  if (!packs_weights()) {
    return value.detach().clone();
  }
  const at::Tensor from = transposed ? value.detach().t() : value.detach();
  at::Tensor made = at::empty(from.sizes(), from.options());
  cpu::prefer_huge_pages(made.mutable_data_ptr(), made.nbytes());
  return made.copy_(from);
}

void check_parameter(const char* name, const at::Tensor& t, at::ScalarType dtype) {
  TORCH_CHECK(
      t.device().is_cpu() && t.layout() == at::kStrided, "freeze: ", name,
      " must be a dense tensor on cpu; got ", t.layout(), " on ", t.device());
  check_memory("freeze", name, t);
  TORCH_CHECK(
      t.scalar_type() == dtype && has_kernel(t), "freeze: ", name,
      " must be float32, float64, float16 or bfloat16 like all others; got ", t.scalar_type());
}

// A linear step's parameters; of them follows what `in_units` are after it.
void check_step(
    const LinearStep& step, at::TensorList own, at::ScalarType dtype,
    std::optional<int64_t>& in_units) {
  const auto check = [&](const char* name, const at::Tensor& t, int64_t dims) {
    check_parameter(name, t, dtype);
    TORCH_CHECK(t.dim() == dims, "freeze: ", name, " must be ", dims, "-D; got ", t.sizes());
  };
  check("weight", own[0], 2);
  const int64_t rows = own[0].size(step.transposed ? 1 : 0);
  const int64_t units = own[0].size(step.transposed ? 0 : 1);
  TORCH_CHECK(
      !in_units.has_value() || *in_units == rows, "freeze: a linear layer must take the ",
      in_units.value_or(0), " values of the one before it; got one that takes ", rows);
  if (step.has_bias) {
    check("bias", own[1], 1);
    TORCH_CHECK(
        own[1].size(0) == units, "freeze: bias must be (units) with units = ", units, "; got ",
        own[1].sizes());
  }
  in_units = units;
}

}  // namespace

struct Frozen::Layers {
  template <class T>
  using Run = c10::SmallVector<cpu::Layer<T>, 8>;

  std::variant<Run<float>, Run<double>, Run<cpu::half_t>, Run<cpu::bfloat16_t>> run;
  std::deque<std::vector<cpu::Plan>> plans;  // of each layer, where `run` looks
};

Frozen::Frozen(std::string_view text, at::TensorList parameters)
    : program_(std::make_unique<const Program>(packed_text(text))) {
  const Program given(text);
  given.check_parameters(parameters);
  TORCH_CHECK(
      !given.linear_steps.empty(), "freeze: the network must have a linear layer; got \"", text,
      "\"");
  const auto run = cpu::linear_run_from(given, 0);
  const bool is_layers = !run.empty() && run.back().last().value == given.steps.size() &&
                         run.front().linear->inputs[0] == 0;
  const at::ScalarType dtype = parameters[given.linear_steps[0]->first_parameter].scalar_type();
  std::optional<int64_t> in_units;
  for (const LinearStep* step : given.linear_steps) {
    if (!is_layers) {
      in_units.reset();
    }
    check_step(*step, given.parameters_of(*step, parameters), dtype, in_units);
  }
  int64_t bytes = 0;
  for (const Step* step : given.steps_with_parameters) {
    auto own = given.parameters_of(*step, parameters);
    if (const LinearStep* const linear = step->as_linear()) {
      parameters_.push_back(packed(own[0], linear->transposed));
      work_per_row_ += own[0].numel();
      bytes += static_cast<int64_t>(own[0].nbytes());
      own = own.slice(1);
    }
    for (const at::Tensor& parameter : own) {
      check_parameter("a parameter", parameter, dtype);
      parameters_.push_back(parameter.detach().clone(at::MemoryFormat::Contiguous));
    }
  }
  if (!is_layers) {
    return;
  }
  auto made = std::make_unique<Layers>();
  cpu::with_storage_type(dtype, [&]<class T>(T) {
    auto& layers = made->run.emplace<Layers::Run<T>>();
    for (const auto& [linear, activation] : cpu::linear_run_from(*program_, 0)) {
      const auto own = program_->parameters_of(*linear, parameters_);
      const cpu::LinearLayer<T> given(
          *linear, own[0], linear->has_bias ? cpu::data<T>(own[1]) : nullptr);
      cpu::Layer<T> layer = {
          given, activation ? activation->activation : linear->activation,
          /*is_step=*/activation != nullptr, /*sums=*/nullptr, /*output=*/nullptr};
      auto& plans = made->plans.emplace_back();
      for (int64_t rows = 1; rows <= kPlannedRows; ++rows) {
        const auto plan = cpu::plan_for_any_setting<T>(
            rows, layer.units, layer.in_units, {nullptr, layer.in_units, 1}, layer.weight, bytes);
        if (!plan.has_value()) {
          break;
        }
        plans.push_back(*plan);
      }
      layer.plans = plans;
      layers.push_back(layer);
    }
    in_units_ = layers.front().in_units;
    units_ = layers.back().units;
  });
  layers_ = std::move(made);
}

Frozen::~Frozen() = default;

void Frozen::run(int64_t rows, const void* x, int64_t row, void* out) const {
  std::visit(
      [&]<class T>(const c10::SmallVector<cpu::Layer<T>, 8>& made) {
        auto layers = made;
        layers.back().output = static_cast<T*>(out);
        cpu::run_layers<T>(rows, {static_cast<const T*>(x), row, 1}, layers);
      },
      layers_->run);
}

at::Tensor Frozen::operator()(const at::Tensor& input) const {
  const c10::impl::ExcludeDispatchKeyGuard below(
      c10::autocast_dispatch_keyset | c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  return cpu::sequential(input, parameters_, *program_);
}

}  // namespace mylayers
