// Matrix products on the CPU, threads included.
#pragma once

#include <optional>

#include "gemm/plan.h"
#include "kernels/kernels.h"

namespace mylayers::cpu {

template <class T>
struct Matrix {
  const T* data;
  int64_t row;  // strides, in elements
  int64_t col;

  Matrix at(int64_t i, int64_t j) const { return {data + i * row + j * col, row, col}; }
  Matrix transposed() const { return {data, col, row}; }
};

// c (m, n) contiguous = act(a (m, k) @ b (k, n) + bias (n) or nothing), accumulated in
// acc_t<T>, rounded once. A row of c depends on its row of a, on b and on bias alone, to
// the bit: each element is one chain of multiply-adds over k, whatever m and the threads.
// `working_set_bytes` are the bytes of all weights that are read in turn with b, which tell how
// fast b is to be had again; those of b are known.
template <class T>
void gemm(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias, Activation act, T* c,
    int64_t working_set_bytes = 0);

// The plan of such a product, if it is the same whatever number of threads and whatever precision
// of float32 will be set when it is computed.
template <class T>
std::optional<Plan> plan_for_any_setting(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, int64_t working_set_bytes);

// gemm by this plan, for the sizes and strides that it was made for; of a only whether its columns
// have unit stride and, if so, its rows' distance may change what is fastest.
template <class T>
void gemm_planned(
    const Plan& plan, int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias,
    Activation act, T* c);

// c (m, n) contiguous = a (m, k) @ b (k, n) for a k that may be far longer than m and n (a
// weight gradient: k counts the rows of the batch). Long sums are cut at places that
// depend on the sizes alone and added up in order, so threads change no bit.
template <class T>
void gemm_long(int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, T* c);

}  // namespace mylayers::cpu
