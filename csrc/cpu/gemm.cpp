#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "ceil_div.h"
#include "gemm/plan.h"
#include "gemm_amx.h"
#include "gemm_aten.h"
#include "scratch.h"

namespace mylayers::cpu {

namespace {

// From one row to the next, so that rows do not lie in the same sets of the caches: an odd number
// of lines, of float32.
int64_t padded_ld(int64_t cols) { return round_up(cols, 32) + 16; }

// A bias as AMX's products add it.
class WideBias {
 public:
  WideBias(int64_t n, const bfloat16_t* bias) : wide_(bias ? n : 0), bias_(wide_.get()) {
    if (bias) {
      kernels().bf16.pack(1, n, bias, n, 1, wide_.get(), n);
    } else {
      bias_ = nullptr;
    }
  }
  const float* get() const { return bias_; }

 private:
  Scratch<float> wide_;
  const float* bias_;
};

// Whether PyTorch's own products may round float32 to bfloat16: where
// torch.set_float32_matmul_precision("medium") or torch.backends.mkldnn.matmul.fp32_precision =
// "bf16" say so.
bool setting_rounds_float32() {
  return at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL) ==
         at::Float32Precision::BF16;
}

template <class T>
constexpr ValueType kValueType = std::is_same_v<T, float>    ? ValueType::kFloat32
                                 : std::is_same_v<T, double> ? ValueType::kFloat64
                                 : std::is_same_v<T, half_t> ? ValueType::kFloat16
                                                             : ValueType::kBFloat16;

template <class T>
ProductShape shape_of(int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b) {
  return {m, n, k, {a.row, a.col}, {b.row, b.col}, kValueType<T>};
}

// Path::kVnniSkinny.
template <class Out>
void run_vnni_skinny(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<bfloat16_t> a,
    Matrix<bfloat16_t> b, Residency residency, const bfloat16_t* bias, Activation act, Out* c,
    int64_t ldc) {
  const auto& vnni = kernels().bf16_vnni;
  const bool many = m > kSkinnyRows;
  const int64_t width = many ? 2 * padded_ld((k + 1) / 2) : round_up(k, 2);
  const Scratch<bfloat16_t> a_rows(plan.copies_a ? m * width : 0);
  if (plan.copies_a) {
    vnni.copy(m, k, a.data, a.row, a.col, a_rows.get(), width);
    a = {a_rows.get(), width, 1};
  }
  constexpr bool kDirect = std::is_same_v<Out, float>;
  const int64_t ld_sums = kDirect ? ldc : many ? padded_ld(n) : n;
  const Scratch<float> scratch(kDirect ? 0 : m * ld_sums);
  float* sums = scratch.get();
  if constexpr (kDirect) {
    sums = c;
  }
  if (many) {
    vnni.skinny_many(m, n, k, a.data, a.row, b.data, b.row, residency, sums, ld_sums);
  } else {
    vnni.skinny(m, n, k, a.data, a.row, b.data, b.row, residency, sums, ld_sums);
  }
  if constexpr (!kDirect) {
    kernels().bf16.epilogue(m, n, sums, ld_sums, bias, act, c, ldc);
  }
}

// Path::kVnni. They have one order of adding however the terms are cut, so here too a row's
// bits are its own.
template <class Out>
void run_vnni(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<bfloat16_t> a,
    Matrix<bfloat16_t> b, const bfloat16_t* bias, Activation act, Out* c, int64_t ldc) {
  const auto& vnni = kernels().bf16_vnni;
  const int64_t panels = ceil_div(n, kPanel), widest = plan.kc;
  // Four lines more than a panel has: the next one would lie in the same sets of the caches.
  const int64_t panel_size = widest * kPanel + 2 * kPanel;
  const bool rounds_in_registers = std::is_same_v<Out, bfloat16_t> && row_of(act).in_registers;
  // A transposed copy writes a line of every row in turn, which must not lie in the same sets of
  // the caches.
  const int64_t lda = 2 * padded_ld(widest / 2);
  const Scratch<bfloat16_t> a_rows(plan.copies_a ? m * lda : 0);
  const Scratch<bfloat16_t> b_panels(panels * panel_size);
  const bool keeps_sums = !rounds_in_registers || k > widest;
  const Scratch<float> sums(keeps_sums ? panels * m * kPanel : 0);
  for (int64_t p = 0; p < k; p += widest) {
    const int64_t kc = std::min(widest, k - p), even_kc = round_up(kc, 2);
    Matrix<bfloat16_t> a_in = a.at(0, p);
    if (plan.copies_a) {
      vnni.copy(m, kc, a_in.data, a.row, a.col, a_rows.get(), lda);
      a_in = {a_rows.get(), lda, 1};
    }
    vnni.pack_vnni(kc, n, b.at(p, 0).data, b.row, b.col, b_panels.get(), panel_size);
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t cols = std::min(kPanel, n - j * kPanel);
      const bfloat16_t* panel = b_panels.get() + j * panel_size;
      float* panel_sums = keeps_sums ? sums.get() + j * m * kPanel : nullptr;
      bfloat16_t* out = nullptr;
      if constexpr (std::is_same_v<Out, bfloat16_t>) {
        out = rounds_in_registers && p + kc == k ? c + j * kPanel : nullptr;
      }
      vnni.macrokernel(
          m, cols, even_kc / 2, a_in.data, a_in.row, j == 0, panel, panel_sums, p > 0,
          bias ? bias + j * kPanel : nullptr, act, out, ldc);
    }
  }
  if (rounds_in_registers) {
    return;
  }
  for (int64_t j = 0; j < panels; ++j) {
    const int64_t cols = std::min(kPanel, n - j * kPanel);
    const float* in = sums.get() + j * m * kPanel;
    if constexpr (std::is_same_v<Out, float>) {
      kernels().f32.epilogue(m, cols, in, kPanel, nullptr, act, c + j * kPanel, ldc);
    } else {
      kernels().bf16.epilogue(
          m, cols, in, kPanel, bias ? bias + j * kPanel : nullptr, act, c + j * kPanel, ldc);
    }
  }
}

// Path::kBands: the rows of one microkernel at a time with all columns of a packed b.
template <class T, class Out>
void run_bands(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias,
    Activation act, Out* c, int64_t ldc) {
  using C = acc_t<T>;
  constexpr bool kWiden = !std::is_same_v<T, C>, kNarrow = !std::is_same_v<Out, C>;
  const auto& product = kernels().product<C>();
  const auto& storage = kernels().storage<T>();
  const int64_t band = product.mr, widest = plan.kc;
  const Scratch<C> micropanels(widest * round_up(n, product.nr));
  const Scratch<C> a_rows(plan.copies_a ? m * widest : 0);
  const Scratch<C> c_sums(kNarrow ? (k > widest ? m : band) * n : 0);
  const C* add = nullptr;
  if constexpr (!kWiden) {
    add = bias;
  }
  for (int64_t p = 0; p < k; p += widest) {
    const int64_t kc = std::min(widest, k - p);
    const bool ends = p + kc == k;
    const Matrix<T> b_in = b.at(p, 0);
    storage.pack_micropanels(kc, n, b_in.data, b_in.row, b_in.col, band, micropanels.get());
    Matrix<C> a_in = {a_rows.get(), widest, 1};
    if (plan.copies_a) {
      storage.pack(m, kc, a.at(0, p).data, a.row, a.col, a_rows.get(), widest);
    } else if constexpr (!kWiden) {
      a_in = a.at(0, p);
    }
    for (int64_t i = 0; i < m; i += band) {
      const int64_t rows = std::min(band, m - i);
      C* sums = c_sums.get() + (k > widest ? i * n : 0);
      if constexpr (!kNarrow) {
        sums = c + i * ldc;
      }
      product.macrokernel(
          rows, n, kc, a_in.at(i, 0).data, a_in.row, a_in.col, /*first=*/!plan.copies_a,
          micropanels.get(), 0, /*in_micropanels=*/true, sums, kNarrow ? n : ldc, p > 0,
          ends && !kNarrow, add, act, {});
      if constexpr (kNarrow) {
        if (ends) {
          storage.epilogue(rows, n, sums, n, bias, act, c + i * ldc, ldc);
        }
      }
    }
  }
}

// Path::kSkinnyTransposed.
template <class T>
void run_skinny_transposed(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b,
    Residency residency, const T* bias, Activation act, T* c, int64_t ldc) {
  const Scratch<T> rows(plan.copies_a ? m * k : 0);
  if (plan.copies_a) {
    kernels().storage<T>().pack(m, k, a.data, a.row, a.col, rows.get(), k);
    a = {rows.get(), k, 1};
  }
  kernels().product<T>().skinny_transposed(
      m, n, k, a.data, a.row, b.data, b.col, residency, c, ldc, bias, act);
}

// Path::kMicrokernels, kSkinny and kSkinnyMany: passes over all of c, a few terms of k in each.
template <class T, class Out>
void run_passes(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b,
    Residency residency, const T* bias, Activation act, Out* c, int64_t ldc) {
  using C = acc_t<T>;
  const auto& product = kernels().product<C>();
  const auto& storage = kernels().storage<T>();
  constexpr bool kWiden = !std::is_same_v<T, C>;     // 16-bit input: widen while packing
  constexpr bool kNarrow = !std::is_same_v<Out, C>;  // 16-bit output: sum in scratch
  const bool many = plan.path == Path::kSkinnyMany;
  const bool in_scratch = kNarrow || many;
  const int64_t widest = plan.kc;

  const Scratch<C> b_panel(widest * (plan.packs_b ? kPanel : plan.keeps_b ? product.nr : 0));
  const Scratch<C> a_micropanels(plan.keeps_a ? m * widest : 0);
  const PackBuffers<C> buffers = {
      plan.keeps_a ? a_micropanels.get() : nullptr, plan.keeps_b ? b_panel.get() : nullptr};
  const int64_t lda = many ? padded_ld(widest) : widest;
  const Scratch<C> a_rows(plan.copies_a ? m * lda : 0);
  const int64_t ld_sums = many ? padded_ld(n) : in_scratch ? n : ldc;
  const Scratch<C> c_sums(in_scratch ? m * ld_sums : 0);
  C* sums = c_sums.get();
  if constexpr (!kNarrow) {
    sums = many ? sums : c;
  }
  const C* add = nullptr;
  if constexpr (!kWiden) {
    add = bias;
  }
  int64_t p = 0;
  do {  // once even for k = 0: the result is then act(bias)
    const int64_t kc = std::min(widest, k - p);
    const bool epilogue = !in_scratch && p + kc == k;
    Matrix<C> a_in;
    if (plan.copies_a) {
      storage.pack(m, kc, a.at(0, p).data, a.row, a.col, a_rows.get(), lda);
      a_in = {a_rows.get(), lda, 1};
    } else if constexpr (!kWiden) {
      a_in = a.at(0, p);
    }
    if (plan.path == Path::kSkinny) {
      storage.skinny(
          m, n, kc, a_in.data, a_in.row, a_in.col, b.at(p, 0).data, b.row, residency, sums, ld_sums,
          p > 0, epilogue, add, act);
    } else if (many) {
      storage.skinny_many(
          m, n, kc, a_in.data, a_in.row, b.at(p, 0).data, b.row, residency, sums, ld_sums, p > 0);
    } else {
      const int64_t panel = plan.packs_b ? kPanel : n;
      for (int64_t j = 0; j < n; j += panel) {
        const int64_t cols = std::min(panel, n - j);
        const C* b_in = b_panel.get();
        if (plan.packs_b) {
          storage.pack_micropanels(kc, cols, b.at(p, j).data, b.row, b.col, m, b_panel.get());
        } else if constexpr (!kWiden) {
          b_in = b.at(p, j).data;
        }
        product.macrokernel(
            m, cols, kc, a_in.data, a_in.row, a_in.col, j == 0, b_in, b.row, plan.packs_b, sums + j,
            ld_sums, p > 0, epilogue, add ? add + j : nullptr, act, buffers);
      }
    }
    p += kc;
  } while (p < k);
  if (in_scratch) {
    const Out* last_bias = nullptr;
    if constexpr (std::is_same_v<Out, T>) {
      last_bias = bias;
    }
    kernels().storage<Out>().epilogue(m, n, sums, ld_sums, last_bias, act, c, ldc);
  }
}

// act(a (m, k) @ b (k, n) + bias) into c, on this thread. Out is T, or acc_t<T> for partial sums
// (then bias must be null).
template <class T, class Out>
void run_task(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b,
    Residency residency, const T* bias, Activation act, Out* c, int64_t ldc) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    switch (plan.path) {
      case Path::kAmxColumns:
      case Path::kAmxRows: {
        const WideBias wide(n, bias);
        return gemm_amx<T, Out>(m, n, k, a, b, wide.get(), act, c, ldc, /*threads=*/1);
      }
      case Path::kVnniSkinny:
        return run_vnni_skinny(plan, m, n, k, a, b, residency, bias, act, c, ldc);
      case Path::kVnni:
        return run_vnni(plan, m, n, k, a, b, bias, act, c, ldc);
      default:
        break;
    }
  }
  if constexpr (std::is_same_v<T, Out> && std::is_same_v<T, acc_t<T>>) {
    if (plan.path == Path::kSkinnyTransposed) {
      return run_skinny_transposed(plan, m, n, k, a, b, residency, bias, act, c, ldc);
    }
  }
  if (plan.path == Path::kBands) {
    return run_bands<T, Out>(plan, m, n, k, a, b, bias, act, c, ldc);
  }
  run_passes<T, Out>(plan, m, n, k, a, b, residency, bias, act, c, ldc);
}

bool has_unit_stride(const Matrix<float>& x) { return x.row == 1 || x.col == 1; }

// x (rows, cols) itself, or a copy in `memory`.
Matrix<float> with_unit_stride(int64_t rows, int64_t cols, const Matrix<float>& x, float* memory) {
  if (has_unit_stride(x)) {
    return x;
  }
  kernels().f32.pack(rows, cols, x.data, x.row, x.col, memory, cols);
  return {memory, cols, 1};
}

}  // namespace

template <class T>
void gemm(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias, Activation act, T* c,
    int64_t working_set_bytes) {
  if (m == 0 || n == 0) {
    return;
  }
  if (is_aten_product(m, n, k)) {
    return gemm_aten<T>(m, n, k, a, b, bias, act, c);
  }
  ProductShape shape = shape_of(m, n, k, a, b);
  if constexpr (std::is_same_v<T, float>) {
    shape.rounds = may_round(n, k, machine()) && setting_rounds_float32();
  }
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  gemm_planned<T>(plan(shape, working_set_bytes, threads, machine()), m, n, k, a, b, bias, act, c);
}

template <class T>
std::optional<Plan> plan_for_any_setting(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, int64_t working_set_bytes) {
  if (m == 0 || n == 0 || is_aten_product(m, n, k) ||
      (std::is_same_v<T, float> && may_round(n, k, machine()))) {
    return std::nullopt;
  }
  constexpr int64_t kMany = 1 << 10;  // a small product takes one thread of them
  const Plan chosen = plan(shape_of(m, n, k, a, b), working_set_bytes, kMany, machine());
  return chosen.threads == 1 ? std::optional(chosen) : std::nullopt;
}

template <class T>
void gemm_planned(
    const Plan& chosen, int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias,
    Activation act, T* c) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    if (is_amx(chosen.tasks[1][1].path)) {
      const WideBias wide(n, bias);
      return gemm_amx<T, T>(m, n, k, a, b, wide.get(), act, c, n, chosen.threads);
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    if (is_amx(chosen.tasks[1][1].path)) {
      const Scratch<float> a_rows(has_unit_stride(a) ? 0 : m * k);
      const Scratch<float> b_rows(has_unit_stride(b) ? 0 : k * n);
      return gemm_amx<T, T>(
          m, n, k, with_unit_stride(m, k, a, a_rows.get()), with_unit_stride(k, n, b, b_rows.get()),
          bias, act, c, n, chosen.threads);
    }
  }
  const auto task = [&](int64_t t) {
    const int64_t row = t % chosen.row_blocks, col = t / chosen.row_blocks;
    const int64_t i = row * chosen.rows, j = col * chosen.cols;
    run_task<T, T>(
        chosen.task(row, col), std::min(chosen.rows, m - i), std::min(chosen.cols, n - j), k,
        a.at(i, 0), b.at(0, j), chosen.residency, bias ? bias + j : nullptr, act, c + i * n + j, n);
  };
  const int64_t tasks = chosen.row_blocks * chosen.col_blocks;
  if (chosen.threads == 1) {
    for (int64_t t = 0; t < tasks; ++t) {
      task(t);
    }
    return;
  }
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      task(t);
    }
  });
}

template <class T>
void gemm_long(int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, T* c) {
  using C = acc_t<T>;
  if (m == 0 || n == 0) {
    return;
  }
  if (is_aten_product(m, n, k)) {
    return gemm<T>(m, n, k, a, b, nullptr, Activation::kNone, c);
  }
  const LongPlan chosen = plan_long(shape_of(m, n, k, a, b), machine());
  const int64_t piece = chosen.piece, pieces = chosen.pieces;
  if (pieces == 1) {
    gemm<T>(m, n, k, a, b, nullptr, Activation::kNone, c);
    return;
  }
  const Scratch<C> partial(pieces * m * n);
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t p = s * piece;
      run_task<T, C>(
          chosen.tasks[s + 1 == pieces], m, n, std::min(piece, k - p), a.at(0, p), b.at(p, 0),
          chosen.residency, nullptr, Activation::kNone, partial.get() + s * m * n, n);
    }
  });
  C* total = partial.get();
  for (int64_t s = 1; s < pieces; ++s) {
    const C* part = partial.get() + s * m * n;
    for (int64_t i = 0; i < m * n; ++i) {
      total[i] += part[i];
    }
  }
  kernels().storage<T>().epilogue(1, m * n, total, 0, nullptr, Activation::kNone, c, 0);
}

#define INSTANTIATE(T)                                                                         \
  template void gemm<T>(                                                                       \
      int64_t, int64_t, int64_t, Matrix<T>, Matrix<T>, const T*, Activation, T*, int64_t);     \
  template std::optional<Plan> plan_for_any_setting<T>(                                        \
      int64_t, int64_t, int64_t, Matrix<T>, Matrix<T>, int64_t);                               \
  template void gemm_planned<T>(                                                               \
      const Plan&, int64_t, int64_t, int64_t, Matrix<T>, Matrix<T>, const T*, Activation, T*); \
  template void gemm_long<T>(int64_t, int64_t, int64_t, Matrix<T>, Matrix<T>, T*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(half_t)
INSTANTIATE(bfloat16_t)
#undef INSTANTIATE

}  // namespace mylayers::cpu
