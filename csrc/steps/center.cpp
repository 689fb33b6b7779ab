// center, center(d,...): X - mean of X.
#include "../center.h"

#include "step.h"

namespace mylayers {
namespace {

struct CenterStep : Step {
  explicit CenterStep(c10::SmallVector<int64_t, 2> given) : dims(std::move(given)) {}

  at::OptionalIntArrayRef dim() const {
    return dims.empty() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(dims);
  }
  at::Tensor forward(at::TensorList inputs, at::TensorList, const StepFunctions&) const override {
    return center(inputs[0], dim());
  }
  // It is its own transpose.
  Tensors backward(const BackwardArguments& given) const override {
    return {center(given.grad_output, dim())};
  }

  const c10::SmallVector<int64_t, 2> dims;  // none: all
};

}  // namespace

std::unique_ptr<Step> parse_center(const StepText& text) {
  auto dims = numbers_in<int64_t>(text.arguments);
  return text.name == "center" && text.suffixes.empty() && dims.has_value()
             ? std::make_unique<CenterStep>(std::move(*dims))
             : nullptr;
}

}  // namespace mylayers
