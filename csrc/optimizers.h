// The updates of torch.optim's SGD, Adam, AdamW, RMSprop and Adagrad, to the bits of their default
// implementation on the CPU: the same operations in the same order, each rounded as ATen's kernel
// of this processor rounds it.
#pragma once

#include <ATen/core/Tensor.h>

#include <variant>

#include "export.h"
#include "optimizer_rules.h"

namespace mylayers {

// One parameter's. All tensors have its dtype, sizes and strides, without gaps; none shares memory
// with what is written.
struct Update {
  std::variant<SgdRule, AdamRule, RmspropRule, AdagradRule> rule;
  int64_t count;
  const void* gradient;
  void* parameter;
  // Null where there is none.
  // SGD: momentum. Adam: mean, mean square, its largest. RMSprop: mean square, mean, momentum.
  // Adagrad: sum of squares.
  void* state[3];
};

// In one pass over all of them, of float or double. Threads share what is large; a value is that
// of its own element alone.
MYLAYERS_API void update(at::ScalarType dtype, c10::ArrayRef<Update> updates);

}  // namespace mylayers
