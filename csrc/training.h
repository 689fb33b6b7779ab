// A step of training up to the gradients: of a chain and a loss that is computed here, without a
// graph; of a graph that somebody else's loss has made, without the engine where it can be.
#pragma once

#include <c10/util/FunctionRef.h>
#include <torch/csrc/autograd/edge.h>

#include "sequential.h"

namespace mylayers {

// A loss of PyTorch's, of an output and a target.
struct Criterion {
  enum class Kind {
    kMse,
    kSmoothL1,
    kHuber,
    kCrossEntropy,
    kL1,
    kBinaryCrossEntropy,
    kBinaryCrossEntropyWithLogits,
    kNll,
    kKlDiv,
    kKlDivOfLogs,
  };
  // Of kl_div: the sum, divided by the number of rows. Others are as PyTorch's functions number
  // them.
  static constexpr int64_t kBatchMean = 3;

  Kind kind;
  int64_t reduction;
  double constant;  // beta of smooth_l1, delta of huber
  int64_t ignored;  // class of cross_entropy or nll_loss that is left out
};

// criterion(sequential(input, parameters, program), target), whose gradients are added to the
// parameters' as its backward() would. Undefined, and nothing done, where only a graph does the
// same: gradients beyond the parameters', hooks, transforms, another device.
MYLAYERS_API at::Tensor forward_backward(
    const at::Tensor& input, at::TensorList parameters, const Program& program,
    const Criterion& criterion, const at::Tensor& target);

// loss.backward(), where all of its graph that is not the loss's own is one node, whose gradients
// go to leaves and are seen by nobody on their way: the engine stops at this node. False, and
// nothing done, for any other graph.
MYLAYERS_API bool backward_to(const torch::autograd::Edge& node, const at::Tensor& loss);

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
