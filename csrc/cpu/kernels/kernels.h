// The inner loops of every CPU kernel, compiled once per instruction set.
//
// The *-inl.h files are one source for all of them; kernels_{generic,avx2,avx512,neon}.cpp
// compile it under their own target, and kernels() picks a table once, by what the
// processor can do. Everything here works on raw pointers on one thread; who splits
// work among threads sits one level up (gemm.cpp, linear_act.cpp, center.cpp).
#pragma once

#include <cstdint>

#include "../../activation.h"
#include "../../export.h"
#include "../../optimizer_rules.h"

namespace mylayers::cpu {

// Storage-only 16-bit types; arithmetic on them is done in float32.
struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
// The type in which values of T are multiplied and summed.
template <class T>
using acc_t = typename Accumulate<T>::type;

// Packed panels are this wide or less.
constexpr int64_t kPanel = 64;
// With so few rows of a, or so few of b, a product waits for memory.
constexpr int64_t kSkinnyRows = 4;
constexpr int64_t kSkinnyTerms = 8;

// Where sums for a mean are cut, whatever the number of threads: values of a run, rows of
// columns.
constexpr int64_t kRunChunk = 1 << 13;
constexpr int64_t kColumnChunk = 256;
// Columns whose sums and means are kept on the stack, in cache.
constexpr int64_t kStrip = 4096;

// Where a weight is likely to be.
enum class Residency {
  kCache,
  kMemory,
  kMemoryByLevel2,  // of a processor that gains by prefetching into level 2
};

// Where a macrokernel keeps what its microkernels share, in the order in which they read it; null:
// nowhere.
template <class C>
struct PackBuffers {
  C* a = nullptr;  // m * k values
  C* b = nullptr;  // one micropanel of k rows
};

// Inner loops over the element type C in which products are formed (float, double).
template <class C>
struct ProductKernels {
  int64_t mr, nr;  // rows and columns of the largest microkernel
  // c (m, n) = act(c0 + a (m, k) @ b (k, n) + bias), b with unit column stride, or `in_micropanels`
  // as pack_micropanels makes them for m rows; c0 = c if `accumulate` else 0; bias and act only if
  // `epilogue`.
  // Every c[i][j] is one chain of fused multiply-adds over k in rising order, so its
  // bits depend on neither m, n nor how k is cut into calls.
  // `first`: a is read for the first time, maybe from memory; later calls for more columns with the
  // same buffers.a read that. The first needs a whole micropanel to fill it.
  void (*macrokernel)(
      int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, int64_t a_col, bool first,
      const C* b, int64_t ldb, bool in_micropanels, C* c, int64_t ldc, bool accumulate,
      bool epilogue, const C* bias, Activation act, PackBuffers<C> buffers);
  // c (m, n) = act(a (m, k) @ b (k, n) + bias) for m <= kSkinnyRows, an a with unit column stride
  // and a b with unit row stride, to the same bits. `residency`: of b.
  void (*skinny_transposed)(
      int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, const C* b, int64_t ldb,
      Residency residency, C* c, int64_t ldc, const C* bias, Activation act);
};

// Inner loops over a storage type T with accumulator C = acc_t<T>.
template <class T>
struct StorageKernels {
  using C = acc_t<T>;
  // out (rows, ld_out >= cols), unit column stride = in (rows, cols) with any strides;
  // columns from cols to ld_out are set to zero.
  void (*pack)(
      int64_t rows, int64_t cols, const T* in, int64_t in_row, int64_t in_col, C* out,
      int64_t ld_out);
  // out: in (rows, cols), with any strides, cut into micropanels of product<C>().nr columns or
  // less, as m rows are multiplied best, one after another; zeros in the last one up to a whole
  // vector.
  void (*pack_micropanels)(
      int64_t rows, int64_t cols, const T* in, int64_t in_row, int64_t in_col, int64_t m, C* out);
  // As ProductKernels::macrokernel, to the same bits, for few rows of a or of b: along all columns,
  // for k > 0. `residency` as above.
  void (*skinny)(
      int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, int64_t a_col, const T* b,
      int64_t ldb, Residency residency, C* c, int64_t ldc, bool accumulate, bool epilogue,
      const C* bias, Activation act);
  // sums (m, n) = c0 + a (m, k) @ b (k, n) to the same bits, for more rows, b as it lies in memory;
  // a and b with unit column stride, c0 = sums if `accumulate` else 0.
  void (*skinny_many)(
      int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, const T* b, int64_t ldb,
      Residency residency, C* sums, int64_t ld_sums, bool accumulate);
  // out (rows, cols) = act(in + bias), rounded once to T.
  void (*epilogue)(
      int64_t rows, int64_t cols, const C* in, int64_t in_row, const T* bias, Activation act,
      T* out, int64_t ld_out);
  // dz = dy * act'(y), rounded to T, as a function of the output y (dy itself for no
  // activation, y then null); db += column sums of dz, rows in rising order. Either of dz, db may
  // be null. dz may be dy.
  void (*act_backward)(
      int64_t rows, int64_t cols, const T* dy, int64_t ld_dy, const T* y, Activation act, T* dz,
      C* db);
  // Sum of n contiguous values, n <= kRunChunk; longer runs are summed in chunks of that size,
  // whose sums are added in order.
  double (*sum)(int64_t n, const T* x);
  // out = x - mean, the mean rounded to T. `non_temporal`: out, of which every row begins a
  // cache line, is written to memory at once, by AVX-512.
  void (*subtract)(int64_t n, const T* x, double mean, T* out, bool non_temporal);
  // Both, for `runs` runs of n <= kRunChunk values, one after another.
  void (*center_runs)(int64_t runs, int64_t n, const T* x, T* out);
  // sums (cols) = column sums of x (rows, cols), rows <= kColumnChunk; more rows are summed in
  // chunks of so many, whose sums are added in order.
  void (*column_sums)(int64_t rows, int64_t cols, const T* x, int64_t ldx, double* sums);
  // out (rows, cols), rows ldx apart too, = x - sums / count, rounded to T; cols <= kStrip.
  void (*subtract_columns)(
      int64_t rows, int64_t cols, const T* x, int64_t ldx, const double* sums, int64_t count,
      T* out, bool non_temporal);
  // Both, for `slices` slices of (rows, cols), one after another; cols <= kStrip.
  void (*center_columns)(
      int64_t slices, int64_t rows, int64_t cols, const T* x, int64_t ldx, T* out,
      bool non_temporal);
  // out (rows, cols) = (x - mean) / sqrt(variance + epsilon) * weight + bias, each row by itself;
  // no bias without a weight, and either may be null.
  void (*layer_norm)(
      int64_t rows, int64_t cols, const T* x, const T* weight, const T* bias, double epsilon,
      T* out);
  // dx of that; dw and db += the weight's and the bias's gradients, rows in rising order. Any of
  // the three may be null.
  void (*layer_norm_backward)(
      int64_t rows, int64_t cols, const T* dy, const T* x, const T* weight, double epsilon, T* dx,
      C* dw, C* db);
};

// What the processor's 16-bit matrix units need beside it.
struct VnniKernels {
  // out (rows, ld_out >= cols) = in, a copy with unit column stride, zeros up to ld_out.
  void (*copy)(
      int64_t rows, int64_t cols, const bfloat16_t* in, int64_t in_row, int64_t in_col,
      bfloat16_t* out, int64_t ld_out);
  // out: panels of kPanel columns, `panel_size` apart, each (ceil(rows / 2), kPanel) pairs
  // (in[2i][j], in[2i + 1][j]): zero where in has no row, and in columns up to the next
  // multiple of 16; untouched beyond.
  void (*pack_vnni)(
      int64_t rows, int64_t cols, const bfloat16_t* in, int64_t in_row, int64_t in_col,
      bfloat16_t* out, int64_t panel_size);
  // For AVX512-BF16, null below the level of AVX-512: sums (m, cols <= kPanel), in rows of kPanel,
  // = c0 + a @ b, a (m, 2 * pairs) with unit column stride, b a panel of pack_vnni, c0 = sums if
  // `accumulate` else 0. If out is not null, act(sums + bias), rounded once, is written there
  // instead, for an act that it applies in registers. Every sum is one chain over the pairs in
  // rising order, so its bits depend on neither m, cols nor how the pairs are cut into calls.
  // `first_panel`: a is read for the first time, maybe from memory.
  void (*macrokernel)(
      int64_t m, int64_t cols, int64_t pairs, const bfloat16_t* a, int64_t lda, bool first_panel,
      const bfloat16_t* b, float* sums, bool accumulate, const bfloat16_t* bias, Activation act,
      bfloat16_t* out, int64_t ld_out);
  // c (m <= kSkinnyRows, n) = a @ b to the same bits, from b (k, n) with unit column stride as it
  // lies in memory; a (m, k) too has unit column stride and, for an odd k, a zero behind each row.
  void (*skinny)(
      int64_t m, int64_t n, int64_t k, const bfloat16_t* a, int64_t lda, const bfloat16_t* b,
      int64_t ldb, Residency residency, float* c, int64_t ldc);
  // sums (m, n) = a @ b to the same bits, for more rows.
  void (*skinny_many)(
      int64_t m, int64_t n, int64_t k, const bfloat16_t* a, int64_t lda, const bfloat16_t* b,
      int64_t ldb, Residency residency, float* sums, int64_t ld_sums);
};

// Products on AMX; all null where there is none.
struct AmxKernels {
  // out (rows, k) = in, a copy with unit column stride; zeros up to the next multiple of 32
  // columns.
  void (*copy)(
      int64_t rows, int64_t k, const bfloat16_t* in, int64_t in_row, int64_t in_col,
      bfloat16_t* out, int64_t ld_out);
  // The same, and VnniKernels::pack_vnni, of float32, rounded on the way as PyTorch rounds it.
  void (*copy_rounded)(
      int64_t rows, int64_t k, const float* in, int64_t in_row, int64_t in_col, bfloat16_t* out,
      int64_t ld_out);
  void (*pack_rounded)(
      int64_t rows, int64_t cols, const float* in, int64_t in_row, int64_t in_col, bfloat16_t* out,
      int64_t panel_size);
  // out (m, cols) = act(c0 + a (m, k) @ b (k, cols) + bias), rounded once; if out is null, sums (m,
  // cols) without bias and act instead. c0 = sums if `accumulate` else 0. a has unit column stride;
  // its last k % 32 terms are read from `last` (m, 32), zeros behind them. b: panels as
  // VnniKernels::pack_vnni makes them, with zeros in terms up to the next multiple of 32. sums has
  // room for whole panels. Every sum is added up 32 terms at a time, in rising order: its bits
  // depend on neither m, cols nor how k is cut into calls, at multiples of 32.
  void (*macrokernel)(
      int64_t m, int64_t cols, int64_t k, const bfloat16_t* a, int64_t lda, const bfloat16_t* last,
      const bfloat16_t* b, int64_t panel_size, float* sums, int64_t ld_sums, bool accumulate,
      const float* bias, Activation act, bfloat16_t* out, int64_t ld_out);
  void (*macrokernel_f32)(
      int64_t m, int64_t cols, int64_t k, const bfloat16_t* a, int64_t lda, const bfloat16_t* last,
      const bfloat16_t* b, int64_t panel_size, float* sums, int64_t ld_sums, bool accumulate,
      const float* bias, Activation act, float* out, int64_t ld_out);
};

// Updates of `count` elements of a parameter, as ../../optimizers.h has them; pointers to state are
// null where the rule has none. Two passes where roots are taken in between: the first writes what
// of, the second reads the roots.
template <class T>
struct UpdateKernels {
  void (*sgd)(int64_t count, const SgdRule& rule, const T* gradient, T* parameter, T* momentum);
  void (*adam_moments)(
      int64_t count, const AdamRule& rule, const T* gradient, T* parameter, T* mean, T* square,
      T* largest, T* squares);
  void (*adam)(int64_t count, const AdamRule& rule, const T* roots, const T* mean, T* parameter);
  void (*rmsprop_moments)(
      int64_t count, const RmspropRule& rule, const T* gradient, const T* parameter, T* square,
      T* mean, T* squares);
  void (*rmsprop)(
      int64_t count, const RmspropRule& rule, const T* roots, const T* gradient, T* parameter,
      T* momentum);
  void (*adagrad_sum)(
      int64_t count, const AdagradRule& rule, const T* gradient, const T* parameter, T* sum,
      T* squares);
  void (*adagrad)(
      int64_t count, const AdagradRule& rule, const T* roots, const T* gradient, T* parameter);
};

struct Kernels {
  const char* name;
  ProductKernels<float> f32_product;
  ProductKernels<double> f64_product;
  StorageKernels<float> f32;
  StorageKernels<double> f64;
  StorageKernels<half_t> f16;
  StorageKernels<bfloat16_t> bf16;
  VnniKernels bf16_vnni;
  AmxKernels amx;
  UpdateKernels<float> f32_updates;
  UpdateKernels<double> f64_updates;

  template <class C>
  const ProductKernels<C>& product() const;
  template <class T>
  const StorageKernels<T>& storage() const;
  template <class T>
  const UpdateKernels<T>& updates() const;
};

template <>
inline const ProductKernels<float>& Kernels::product<float>() const {
  return f32_product;
}
template <>
inline const ProductKernels<double>& Kernels::product<double>() const {
  return f64_product;
}
template <>
inline const StorageKernels<float>& Kernels::storage<float>() const {
  return f32;
}
template <>
inline const StorageKernels<double>& Kernels::storage<double>() const {
  return f64;
}
template <>
inline const StorageKernels<half_t>& Kernels::storage<half_t>() const {
  return f16;
}
template <>
inline const StorageKernels<bfloat16_t>& Kernels::storage<bfloat16_t>() const {
  return bf16;
}

template <>
inline const UpdateKernels<float>& Kernels::updates<float>() const {
  return f32_updates;
}
template <>
inline const UpdateKernels<double>& Kernels::updates<double>() const {
  return f64_updates;
}

// The table of machine(), chosen at first use.
MYLAYERS_API const Kernels& kernels();

// One per source file: neon on 64-bit Arm, where it is the only one; avx2 and avx512 on x86.
const Kernels& generic_kernels();
const Kernels& neon_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

}  // namespace mylayers::cpu
