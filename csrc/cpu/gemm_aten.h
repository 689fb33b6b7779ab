// PyTorch's own products, for machines of a kind on which ours were never measured.
#pragma once

#include "gemm.h"

namespace mylayers::cpu {

// Whether products that are not small are PyTorch's here: where no machine of this kind was
// measured, unless the environment has MYLAYERS_PRODUCTS=own. Their bits may depend on the other
// rows of the batch and on the threads, and of 16 bits an activation other than relu rounds twice.
// Throws std::invalid_argument for any other value of the variable, which is read once.
MYLAYERS_API bool has_aten_products();

// Whether this one is.
bool is_aten_product(int64_t m, int64_t n, int64_t k);

// As gemm.
template <class T>
void gemm_aten(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias, Activation act, T* c);

}  // namespace mylayers::cpu
