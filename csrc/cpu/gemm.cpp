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
int64_t apart(int64_t cols) { return round_up(cols, 32) + 16; }

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

// Path::kPairSkinny.
template <class Out>
void run_pair_skinny(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<bfloat16_t> a,
    Matrix<bfloat16_t> b, Source source, const bfloat16_t* bias, Activation act, Out* c,
    int64_t c_row) {
  const auto& pairs = kernels().bf16_pairs;
  const bool many = m > kStreamRows;
  const int64_t width = many ? 2 * apart((k + 1) / 2) : round_up(k, 2);
  const Scratch<bfloat16_t> a_rows(plan.copies_a ? m * width : 0);
  if (plan.copies_a) {
    pairs.copy(m, k, a.data, a.row, a.col, a_rows.get(), width);
    a = {a_rows.get(), width, 1};
  }
  constexpr bool kDirect = std::is_same_v<Out, float>;
  const int64_t sums_row = kDirect ? c_row : many ? apart(n) : n;
  const Scratch<float> scratch(kDirect ? 0 : m * sums_row);
  float* sums = scratch.get();
  if constexpr (kDirect) {
    sums = c;
  }
  if (many) {
    pairs.stream_many(m, n, k, a.data, a.row, b.data, b.row, source, sums, sums_row);
  } else {
    pairs.stream(m, n, k, a.data, a.row, b.data, b.row, source, sums, sums_row);
  }
  if constexpr (!kDirect) {
    kernels().bf16.finish(m, n, sums, sums_row, bias, act, c, c_row);
  }
}

// Path::kPairTiles. They have one order of adding however the terms are cut, so here too a row's
// bits are its own.
template <class Out>
void run_pair_tiles(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<bfloat16_t> a,
    Matrix<bfloat16_t> b, const bfloat16_t* bias, Activation act, Out* c, int64_t c_row) {
  const auto& pairs = kernels().bf16_pairs;
  const int64_t panels = ceil_div(n, kPanel), widest = plan.depth;
  // Four lines more than a panel has: the next one would lie in the same sets of the caches.
  const int64_t panel_size = widest * kPanel + 2 * kPanel;
  const bool rounds_in_tile = std::is_same_v<Out, bfloat16_t> && row_of(act).in_registers;
  // A transposed copy writes a line of every row in turn: 1.08 times the time of a whole weight
  // gradient of 1024 x 1024 x 1024 while rows lay in the same sets.
  const int64_t a_row = 2 * apart(widest / 2);
  const Scratch<bfloat16_t> a_rows(plan.copies_a ? m * a_row : 0);
  const Scratch<bfloat16_t> b_panels(panels * panel_size);
  const bool keeps_sums = !rounds_in_tile || k > widest;
  const Scratch<float> sums(keeps_sums ? panels * m * kPanel : 0);
  for (int64_t p = 0; p < k; p += widest) {
    const int64_t depth = std::min(widest, k - p), even_depth = round_up(depth, 2);
    Matrix<bfloat16_t> a_in = a.at(0, p);
    if (plan.copies_a) {
      pairs.copy(m, depth, a_in.data, a.row, a.col, a_rows.get(), a_row);
      a_in = {a_rows.get(), a_row, 1};
    }
    pairs.pack_pairs(depth, n, b.at(p, 0).data, b.row, b.col, b_panels.get(), panel_size);
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t cols = std::min(kPanel, n - j * kPanel);
      const bfloat16_t* panel = b_panels.get() + j * panel_size;
      float* panel_sums = keeps_sums ? sums.get() + j * m * kPanel : nullptr;
      bfloat16_t* out = nullptr;
      if constexpr (std::is_same_v<Out, bfloat16_t>) {
        out = rounds_in_tile && p + depth == k ? c + j * kPanel : nullptr;
      }
      pairs.block(
          m, cols, even_depth / 2, a_in.data, a_in.row, j == 0, panel, panel_sums, p > 0,
          bias ? bias + j * kPanel : nullptr, act, out, c_row);
    }
  }
  if (rounds_in_tile) {
    return;
  }
  for (int64_t j = 0; j < panels; ++j) {
    const int64_t cols = std::min(kPanel, n - j * kPanel);
    const float* in = sums.get() + j * m * kPanel;
    if constexpr (std::is_same_v<Out, float>) {
      kernels().f32.finish(m, cols, in, kPanel, nullptr, act, c + j * kPanel, c_row);
    } else {
      kernels().bf16.finish(
          m, cols, in, kPanel, bias ? bias + j * kPanel : nullptr, act, c + j * kPanel, c_row);
    }
  }
}

// Path::kBands: the rows of one microkernel at a time with all columns of a packed b.
template <class T, class Out>
void run_bands(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias,
    Activation act, Out* c, int64_t c_row) {
  using C = acc_t<T>;
  constexpr bool kWiden = !std::is_same_v<T, C>, kNarrow = !std::is_same_v<Out, C>;
  const auto& product = kernels().product<C>();
  const auto& storage = kernels().storage<T>();
  const int64_t band = product.rows, widest = plan.depth;
  const Scratch<C> strips(widest * round_up(n, product.strip));
  const Scratch<C> a_rows(plan.copies_a ? m * widest : 0);
  const Scratch<C> c_sums(kNarrow ? (k > widest ? m : band) * n : 0);
  const C* add = nullptr;
  if constexpr (!kWiden) {
    add = bias;
  }
  for (int64_t p = 0; p < k; p += widest) {
    const int64_t depth = std::min(widest, k - p);
    const bool ends = p + depth == k;
    const Matrix<T> b_in = b.at(p, 0);
    storage.pack_strips(depth, n, b_in.data, b_in.row, b_in.col, band, strips.get());
    Matrix<C> a_in = {a_rows.get(), widest, 1};
    if (plan.copies_a) {
      storage.pack(m, depth, a.at(0, p).data, a.row, a.col, a_rows.get(), widest);
    } else if constexpr (!kWiden) {
      a_in = a.at(0, p);
    }
    for (int64_t i = 0; i < m; i += band) {
      const int64_t rows = std::min(band, m - i);
      C* sums = c_sums.get() + (k > widest ? i * n : 0);
      if constexpr (!kNarrow) {
        sums = c + i * c_row;
      }
      product.block(
          rows, n, depth, a_in.at(i, 0).data, a_in.row, a_in.col, /*first=*/!plan.copies_a,
          strips.get(), 0, /*in_strips=*/true, sums, kNarrow ? n : c_row, p > 0, ends && !kNarrow,
          add, act, {});
      if constexpr (kNarrow) {
        if (ends) {
          storage.finish(rows, n, sums, n, bias, act, c + i * c_row, c_row);
        }
      }
    }
  }
}

// Path::kSkinnyTransposed.
template <class T>
void run_skinny_transposed(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, Source source,
    const T* bias, Activation act, T* c, int64_t c_row) {
  const Scratch<T> rows(plan.copies_a ? m * k : 0);
  if (plan.copies_a) {
    kernels().storage<T>().pack(m, k, a.data, a.row, a.col, rows.get(), k);
    a = {rows.get(), k, 1};
  }
  kernels().product<T>().transposed(
      m, n, k, a.data, a.row, b.data, b.col, source, c, c_row, bias, act);
}

// Path::kTiles, kSkinny and kSkinnyMany: passes over all of c, a few terms of k in each.
template <class T, class Out>
void run_passes(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, Source source,
    const T* bias, Activation act, Out* c, int64_t c_row) {
  using C = acc_t<T>;
  const auto& product = kernels().product<C>();
  const auto& storage = kernels().storage<T>();
  constexpr bool kWiden = !std::is_same_v<T, C>;     // 16-bit input: widen while packing
  constexpr bool kNarrow = !std::is_same_v<Out, C>;  // 16-bit output: sum in scratch
  const bool many = plan.path == Path::kSkinnyMany;
  const bool in_scratch = kNarrow || many;
  const int64_t widest = plan.depth;

  const Scratch<C> b_panel(widest * (plan.packs_b ? kPanel : plan.keeps_b ? product.strip : 0));
  const Scratch<C> a_tiles(plan.keeps_a ? m * widest : 0);
  const Copies<C> copies = {
      plan.keeps_a ? a_tiles.get() : nullptr, plan.keeps_b ? b_panel.get() : nullptr};
  const int64_t a_row = many ? apart(widest) : widest;
  const Scratch<C> a_rows(plan.copies_a ? m * a_row : 0);
  const int64_t sums_row = many ? apart(n) : in_scratch ? n : c_row;
  const Scratch<C> c_sums(in_scratch ? m * sums_row : 0);
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
    const int64_t depth = std::min(widest, k - p);
    const bool finish = !in_scratch && p + depth == k;
    Matrix<C> a_in;
    if (plan.copies_a) {
      storage.pack(m, depth, a.at(0, p).data, a.row, a.col, a_rows.get(), a_row);
      a_in = {a_rows.get(), a_row, 1};
    } else if constexpr (!kWiden) {
      a_in = a.at(0, p);
    }
    if (plan.path == Path::kSkinny) {
      storage.stream(
          m, n, depth, a_in.data, a_in.row, a_in.col, b.at(p, 0).data, b.row, source, sums,
          sums_row, p > 0, finish, add, act);
    } else if (many) {
      storage.stream_many(
          m, n, depth, a_in.data, a_in.row, b.at(p, 0).data, b.row, source, sums, sums_row, p > 0);
    } else {
      const int64_t panel = plan.packs_b ? kPanel : n;
      for (int64_t j = 0; j < n; j += panel) {
        const int64_t cols = std::min(panel, n - j);
        const C* b_in = b_panel.get();
        if (plan.packs_b) {
          storage.pack_strips(depth, cols, b.at(p, j).data, b.row, b.col, m, b_panel.get());
        } else if constexpr (!kWiden) {
          b_in = b.at(p, j).data;
        }
        product.block(
            m, cols, depth, a_in.data, a_in.row, a_in.col, j == 0, b_in, b.row, plan.packs_b,
            sums + j, sums_row, p > 0, finish, add ? add + j : nullptr, act, copies);
      }
    }
    p += depth;
  } while (p < k);
  if (in_scratch) {
    const Out* last_bias = nullptr;
    if constexpr (std::is_same_v<Out, T>) {
      last_bias = bias;
    }
    kernels().storage<Out>().finish(m, n, sums, sums_row, last_bias, act, c, c_row);
  }
}

// act(a (m, k) @ b (k, n) + bias) into c, on this thread. Out is T, or acc_t<T> for partial sums
// (then bias must be null).
template <class T, class Out>
void run_task(
    const TaskPlan& plan, int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, Source source,
    const T* bias, Activation act, Out* c, int64_t c_row) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    switch (plan.path) {
      case Path::kAmxColumns:
      case Path::kAmxRows: {
        const WideBias wide(n, bias);
        return gemm_amx<T, Out>(m, n, k, a, b, wide.get(), act, c, c_row, /*threads=*/1);
      }
      case Path::kPairSkinny:
        return run_pair_skinny(plan, m, n, k, a, b, source, bias, act, c, c_row);
      case Path::kPairTiles:
        return run_pair_tiles(plan, m, n, k, a, b, bias, act, c, c_row);
      default:
        break;
    }
  }
  if constexpr (std::is_same_v<T, Out> && std::is_same_v<T, acc_t<T>>) {
    if (plan.path == Path::kSkinnyTransposed) {
      return run_skinny_transposed(plan, m, n, k, a, b, source, bias, act, c, c_row);
    }
  }
  if (plan.path == Path::kBands) {
    return run_bands<T, Out>(plan, m, n, k, a, b, bias, act, c, c_row);
  }
  run_passes<T, Out>(plan, m, n, k, a, b, source, bias, act, c, c_row);
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
    int64_t in_turn) {
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
  const Plan chosen = plan(shape, in_turn, threads, machine());
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
        a.at(i, 0), b.at(0, j), chosen.source, bias ? bias + j : nullptr, act, c + i * n + j, n);
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
          chosen.source, nullptr, Activation::kNone, partial.get() + s * m * n, n);
    }
  });
  C* total = partial.get();
  for (int64_t s = 1; s < pieces; ++s) {
    const C* part = partial.get() + s * m * n;
    for (int64_t i = 0; i < m * n; ++i) {
      total[i] += part[i];
    }
  }
  kernels().storage<T>().finish(1, m * n, total, 0, nullptr, Activation::kNone, c, 0);
}

#define INSTANTIATE(T)                                                                     \
  template void gemm<T>(                                                                   \
      int64_t, int64_t, int64_t, Matrix<T>, Matrix<T>, const T*, Activation, T*, int64_t); \
  template void gemm_long<T>(int64_t, int64_t, int64_t, Matrix<T>, Matrix<T>, T*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(half_t)
INSTANTIATE(bfloat16_t)
#undef INSTANTIATE

}  // namespace mylayers::cpu
