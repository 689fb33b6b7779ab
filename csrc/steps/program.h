// Programs of mylayers::sequential: their text, and what leads from one step to another.
//
// A program names its steps, separated by "; ":
//
//   linear[+bias][+ACT]     act(X @ W + b), W (in_units, units); ACT: one whose derivative is a
//                           function of its output
//   linear_t[+bias][+ACT]   the same with W (units, in_units), as nn.Linear keeps it
//   ACT                     an activation alone (csrc/activation.h)
//   center, center(d,...)   X - mean of X over dimensions d, or over all
//   layer_norm(d,...,epsilon)[+weight[+bias]]
//                           X normalised over its last dimensions, of sizes d, then * W + b
//   flatten(first,last)     X with these dimensions as one; never the last step
//   add@i,j                 the sum of values i and j
//
// Value 0 is the program's input, value i what its i-th step makes; the last is its result. A step
// reads the value before it, or those that "@" names behind it: "linear_t+bias+relu@0".
// `parameters` holds each step's weight and then its bias, of those that it has.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "../export.h"
#include "step.h"

namespace mylayers {

struct Value {
  size_t source;       // the value whose memory it has: itself, unless it is a view
  size_t readers = 0;  // steps that read it
  size_t last = 0;     // the last of them, by the value that it makes
};

struct MYLAYERS_API Program {
  explicit Program(std::string_view text);  // ValueError for what the grammar lacks

  // The same, parsed once: a thread keeps those that it was last asked for.
  static std::shared_ptr<const Program> of(std::string_view text);

  void check_parameters(at::TensorList given) const;
  at::TensorList parameters_of(const Step& step, at::TensorList all) const {
    return all.slice(step.first_parameter, step.parameters());
  }

  std::string text;
  std::vector<std::unique_ptr<const Step>> steps;
  c10::SmallVector<const LinearStep*, 8> linear_steps;  // those of them that are linear
  c10::SmallVector<const Step*, 8> steps_with_parameters;
  std::vector<Value> values;           // of the input and of every step
  size_t outputs = 0, parameters = 0;  // of steps that are no views, and in all
  bool is_line = true;                 // every step reads the value before it
  bool casts_as_one = true;            // all compute in autocast's dtype
};

// The values of a program while it runs. The input and the parameters must outlive it.
class Run {
 public:
  Run(const Program& program, const at::Tensor& input)
      : program_(program), input_(input), made_(program.steps.size()) {}

  const at::Tensor& value(size_t i) const { return i == 0 ? input_ : made_[i - 1]; }
  Tensors inputs_of(const Step& step) const {
    Tensors inputs;
    for (const size_t i : step.inputs) {
      inputs.push_back(value(i));
    }
    return inputs;
  }
  void set(const Step& step, at::Tensor made) { made_[step.value - 1] = std::move(made); }
  // Lets go of what no later step reads.
  void release(const Step& step) {
    for (const size_t i : step.inputs) {
      if (i != 0 && program_.values[i].last == step.value) {
        made_[i - 1].reset();
      }
    }
  }
  // Of all steps that are no views.
  std::vector<at::Tensor> outputs() const;
  at::Tensor take_result() { return std::move(made_.back()); }

 private:
  const Program& program_;
  const at::Tensor& input_;
  c10::SmallVector<at::Tensor, 8> made_;
};

// Gradients asked for: the input's, then each parameter's.
using GradientsAskedFor = c10::SmallVector<bool, 16>;

// What the backward that gives these gradients reads: what the single layers would keep.
struct SavedForBackward {
  SavedForBackward(const Program& program, const GradientsAskedFor& asked);

  bool input = false;
  std::vector<bool> outputs, parameters;
};

// Of the input and each parameter: whether gradients that arrive at these outputs reach it.
GradientsAskedFor reached_from(at::TensorList grad_outputs, const Program& program);

// What every flatten flattens, as the backward wants it: its dimensions' number, then their sizes.
// Kept in place of the tensors, which would be held for nothing else.
std::vector<c10::SymInt> flattened_sizes(
    const at::Tensor& input, at::TensorList outputs, const Program& program);

// The backward of a program: the gradients asked for, in order.
std::vector<at::Tensor> sequential_backward_by(
    const StepFunctions& functions, at::TensorList grad_outputs, const at::Tensor& input,
    at::TensorList outputs, at::TensorList parameters, c10::SymIntArrayRef flattened,
    const Program& program, const GradientsAskedFor& asked);

}  // namespace mylayers
