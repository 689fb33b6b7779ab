// mylayers::center: what every backend shares.
//
//   center(X) = X - mean(X), the mean taken over `dim` (all dimensions if none)
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/OptionalArrayRef.h>

#include <optional>

#include "center_sizes.h"
#include "dispatch/questions.h"
#include "export.h"

namespace mylayers {

// The dimensions of the mean, wrapped to 0..rank-1, sorted; all of them for none or an
// empty list, as torch.mean reads it. IndexError out of range, RuntimeError for a repeat.
c10::SmallVector<int64_t, 6> center_dims(const at::Tensor& input, at::OptionalIntArrayRef dim);

// What center takes and gives, in each of its forms below.
using CenterFunction = at::Tensor(const at::Tensor& input, at::OptionalIntArrayRef dim);

// Through the dispatcher, or straight to where it would lead.
MYLAYERS_API CenterFunction center;
MYLAYERS_API at::Tensor center_by(
    Shortcut shortcut, const at::Tensor& input, at::OptionalIntArrayRef dim);
// Through the dispatcher.
CenterFunction dispatch_center;
// What the kernel computes, below Autograd, in a node of the graph.
at::Tensor record_center(
    const at::Tensor& input, at::OptionalIntArrayRef dim, CenterFunction* kernel);

// The ATen formula.
CenterFunction center_formula;

// What the kernels share (center.cpp). How the memory of an input without gaps and overlap is seen,
// passed through in its own order; nothing for a pattern of dimensions with more turns, such as
// a mean over the first and third of four.
std::optional<CenterSizes> center_sizes(const at::Tensor& input, at::IntArrayRef dims);

// For what that does not cover: the averaged dimensions are brought to the end, in a contiguous
// copy, and the kernel's result back into output.
at::Tensor center_moved(
    const at::Tensor& input, at::IntArrayRef dims, const at::Tensor& output,
    CenterFunction* kernel);

// The compiled kernel; it checks its arguments.
namespace cpu {
CenterFunction center;
}

}  // namespace mylayers
