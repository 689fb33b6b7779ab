// A step of training up to the gradients, of a chain and a loss, without a graph.
#pragma once

#include <c10/util/FunctionRef.h>

#include "sequential.h"

namespace mylayers {

// A loss of PyTorch's, of an output and a target.
struct Criterion {
  enum class Kind { kMse, kSmoothL1, kHuber, kCrossEntropy };
  Kind kind;
  int64_t reduction;  // as PyTorch's functions number them
  double constant;    // beta of smooth_l1, delta of huber
  int64_t ignored;    // class of cross_entropy that is left out
};

// criterion(sequential(input, parameters, program), target), whose gradients are added to the
// parameters' as its backward() would. Undefined, and nothing done, where only a graph does the
// same: gradients beyond the parameters', hooks, transforms, another device.
MYLAYERS_API at::Tensor forward_backward(
    const at::Tensor& input, at::TensorList parameters, const Program& program,
    const Criterion& criterion, const at::Tensor& target);

namespace cpu {
// Whether the program is nothing but linear layers, on a matrix, and over in microseconds.
bool is_small_chain(const at::Tensor& input, at::TensorList parameters, const Program& program);
// Of such a one the gradients asked for, in order, from the output's, which `gradient_of` gives;
// none where it gives none. Only the output and the gradients are tensors.
std::vector<at::Tensor> small_chain_gradients(
    const at::Tensor& input, at::TensorList parameters, const Program& program,
    const GradientsAskedFor& asked, c10::function_ref<at::Tensor(const at::Tensor&)> gradient_of);
}  // namespace cpu

}  // namespace mylayers
