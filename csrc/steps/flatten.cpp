// flatten(first,last): a view of X with these dimensions as one.
#include <ATen/ops/flatten.h>

#include "step.h"

namespace mylayers {
namespace {

struct FlattenStep : Step {
  FlattenStep(int64_t first_dim, int64_t last_dim) : first(first_dim), last(last_dim) {}

  bool is_view() const override { return true; }
  at::Tensor forward(at::TensorList inputs, at::TensorList, const StepFunctions&) const override {
    return at::flatten(inputs[0], first, last);
  }
  Tensors backward(const BackwardArguments& given) const override {
    const at::Tensor& grad = given.grad_output;
    TORCH_SYM_CHECK(
        c10::multiply_integers(given.viewed_sizes).sym_eq(grad.sym_numel()),
        "sequential_backward: flattened must have the elements of a gradient of ", grad.sym_sizes(),
        "; got sizes ", given.viewed_sizes);
    return {grad.reshape_symint(given.viewed_sizes)};
  }

  const int64_t first, last;
};

}  // namespace

std::unique_ptr<Step> parse_flatten(const StepText& text) {
  const auto dims = numbers_in<int64_t>(text.arguments);
  return text.name == "flatten" && dims.has_value() && dims->size() == 2 && text.suffixes.empty()
             ? std::make_unique<FlattenStep>((*dims)[0], (*dims)[1])
             : nullptr;
}

}  // namespace mylayers
