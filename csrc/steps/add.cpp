// add@i,j: the sum of two values of the same sizes, as a residual connection has it.
#include <ATen/TensorOperators.h>

#include "step.h"

namespace mylayers {
namespace {

struct AddStep : Step {
  size_t arity() const override { return 2; }
  at::Tensor forward(at::TensorList inputs, at::TensorList, const StepFunctions&) const override {
    const at::Tensor &a = inputs[0], &b = inputs[1];
    // A sum that broadcasts has another gradient. A nested tensor has no sizes; ATen checks it.
    if (!a.is_nested() && !b.is_nested()) {
      bool same = a.dim() == b.dim();
      for (int64_t d = 0; same && d < a.dim(); ++d) {
        same = a.sym_size(d) == b.sym_size(d);
      }
      TORCH_CHECK(
          same, "sequential: add must have inputs of the same sizes; got ", a.sym_sizes(), " and ",
          b.sym_sizes());
    }
    return a + b;
  }
  Tensors backward(const BackwardArguments& given) const override {
    return {given.grad_output, given.grad_output};
  }
};

}  // namespace

std::unique_ptr<Step> parse_add(const StepText& text) {
  return text.name == "add" && text.is_bare() ? std::make_unique<AddStep>() : nullptr;
}

}  // namespace mylayers
