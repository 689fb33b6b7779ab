// A step of a program: what it computes of the values that it reads, and their gradients.
//
// A kind of step is a class in a file of its own, with the parser that makes it; the parsers are
// listed at the end.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "../layer_norm.h"
#include "../linear_act.h"
#include "text.h"

namespace mylayers {

using Tensors = c10::SmallVector<at::Tensor, 2>;
using Flags = c10::SmallVector<bool, 2>;

// Of what a step reads, in order: whether its gradient is asked for.
struct GradientsOfStep {
  Flags inputs, parameters;
};

// What the gradients asked for are computed from.
struct ReadByBackward {
  Flags inputs, parameters;
  bool output = false;
};

// What steps are computed with, where that is not an operator: ATen's formulas, or kernels.
struct StepFunctions {
  ActivationFunction* activation;
  ActivationBackwardFunction* activation_backward;
  LinearBackwardFunction* linear_backward;
  LayerNormFunction* layer_norm;
  LayerNormBackwardFunction* layer_norm_backward;
};
// Differentiable, for every device and dtype.
extern const StepFunctions kFormulas;

// What is at hand for one step's backward; tensors that it does not read may be undefined.
struct BackwardArguments {
  at::Tensor grad_output;
  at::TensorList inputs, parameters;
  at::Tensor output;
  c10::SymIntArrayRef viewed_sizes;  // for a view: of its input
  GradientsOfStep asked;
  const StepFunctions& functions;
};

struct LinearStep;
struct ActivationStep;

class Step {
 public:
  Step() = default;
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;
  virtual ~Step() = default;

  // How many values and parameters it reads.
  virtual size_t arity() const { return 1; }
  virtual size_t parameters() const { return 0; }
  // Whether its result is a view of its input; it then is none of the program's outputs.
  virtual bool is_view() const { return false; }
  // Whether autocast lets it compute in the dtype that a linear layer has there.
  virtual bool computes_in_autocast_dtype() const { return true; }
  // Itself, if it is one: the compiled kernels run several of them at a time.
  virtual const LinearStep* as_linear() const { return nullptr; }
  virtual const ActivationStep* as_activation() const { return nullptr; }

  // By operators that go through the dispatcher, and the functions.
  virtual at::Tensor forward(
      at::TensorList inputs, at::TensorList parameters, const StepFunctions& functions) const = 0;
  virtual ReadByBackward read_by_backward(const GradientsOfStep&) const {
    return {Flags(arity()), Flags(parameters())};
  }
  // The gradients of the inputs, then of the parameters; those that are not asked for may be
  // undefined.
  virtual Tensors backward(const BackwardArguments& given) const = 0;

  // Its place in a program, which sets it (program.h).
  c10::SmallVector<size_t, 2> inputs = {};  // the values that it reads
  size_t value = 0;                         // the one that it makes
  size_t output = 0;                        // its number among the outputs, unless it is a view
  size_t first_parameter = 0;
};

// act(X @ W + b), for an activation that does not read its input in backward.
struct LinearStep : Step {
  bool transposed = false, has_bias = false;
  Activation activation = Activation::kNone;

  size_t parameters() const override { return 1 + has_bias; }
  const LinearStep* as_linear() const override { return this; }
  at::Tensor forward(
      at::TensorList inputs, at::TensorList parameters,
      const StepFunctions& functions) const override;
  ReadByBackward read_by_backward(const GradientsOfStep& asked) const override;
  Tensors backward(const BackwardArguments& given) const override;
};

// act(X)
struct ActivationStep : Step {
  explicit ActivationStep(Activation given) : activation(given) {}

  const Activation activation;

  const ActivationStep* as_activation() const override { return this; }
  at::Tensor forward(
      at::TensorList inputs, at::TensorList parameters,
      const StepFunctions& functions) const override;
  ReadByBackward read_by_backward(const GradientsOfStep& asked) const override;
  Tensors backward(const BackwardArguments& given) const override;
};

// One for each kind of step: the step; null where the text names none of its kind, or not as it
// must be.
using StepParser = std::unique_ptr<Step>(const StepText& text);
StepParser parse_linear, parse_activation, parse_center, parse_layer_norm, parse_flatten, parse_add;
inline constexpr StepParser* kStepParsers[] = {parse_linear,     parse_activation, parse_center,
                                               parse_layer_norm, parse_flatten,    parse_add};

}  // namespace mylayers
