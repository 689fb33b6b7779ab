// Products on CUDA, by cuBLASLt where it takes them and by ATen where not.
#pragma once

#include <ATen/core/Tensor.h>

namespace mylayers::cuda {

// out (m, n), contiguous = a (m, k) @ b (k, n) + bias (n), then relu if asked. a, b and a defined
// bias are of one dtype with any strides; out is of the same or, without bias and relu, of the
// dtype that products are summed in. Sums are formed in float32 at least and rounded once; whether
// float32 may be multiplied as TF32 is PyTorch's setting.
void gemm(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias, bool relu,
    const at::Tensor& out);

}  // namespace mylayers::cuda
