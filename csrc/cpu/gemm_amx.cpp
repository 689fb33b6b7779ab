#include "gemm_amx.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "ceil_div.h"
#include "machine/tuning.h"
#include "scratch.h"
#include "team.h"

namespace mylayers::cpu {

namespace {

// Terms in a row of a tile, which sums are cut at; rows and columns of a tile.
constexpr int64_t kTerms = 32;
constexpr int64_t kEdge = 16;
// Terms of one pass: a panel is then 32 KiB, which stay in level-1 cache while the rows go by.
constexpr int64_t kDepth = 256;
// Rows of one pass, whose 128 KiB stay in level-2 cache while the panels go by.
constexpr int64_t kRows = 256;
// Columns and terms that are packed together, 4 MiB.
constexpr int64_t kColumns = 512;
constexpr int64_t kDeep = 4096;
// Rows whose sums are kept, in 16 MiB, while more terms than that go by.
constexpr int64_t kMostRows = 8192;
// Of so few terms a product is all writing: long runs of few rows, not short ones of many.
constexpr int64_t kFlatTerms = 64;
constexpr int64_t kFlatColumns = 4096;

// One line more than a panel has: the next one would lie in the same sets of the caches.
constexpr int64_t kPadding = 32;

constexpr int64_t panel_size(int64_t depth) { return depth * kPanel + kPadding; }

// x (rows, cols), whose rows or columns are contiguous, in bfloat16: x itself, or its values
// rounded into `memory`, of rounded_size values, in the same order.
Matrix<bfloat16_t> rounded(int64_t, int64_t, Matrix<bfloat16_t> x, bfloat16_t*) { return x; }
Matrix<bfloat16_t> rounded(int64_t rows, int64_t cols, Matrix<float> x, bfloat16_t* memory) {
  const bool by_rows = x.col == 1;
  const int64_t runs = by_rows ? rows : cols, length = by_rows ? cols : rows;
  const int64_t apart = round_up(length, kTerms) + kTerms;
  kernels().bf16.finish(
      runs, length, x.data, by_rows ? x.row : x.col, nullptr, Activation::kNone, memory, apart);
  return by_rows ? Matrix<bfloat16_t>{memory, apart, 1} : Matrix<bfloat16_t>{memory, 1, apart};
}
template <class In>
constexpr int64_t rounded_size(int64_t rows, int64_t cols) {
  return std::is_same_v<In, float> ? (rows + 2 * kTerms) * (cols + 2 * kTerms) : 0;
}

// `depth` rows and `cols` columns of b, with zeros up to whole tiles of terms. `memory`: for what
// is rounded, of rounded_size values.
template <class In>
void pack(
    int64_t depth, int64_t cols, Matrix<In> in, bfloat16_t* memory, bfloat16_t* panels,
    int64_t size) {
  const Matrix<bfloat16_t> b = rounded(depth, cols, in, memory);
  kernels().bf16_pairs.pack_pairs(depth, cols, b.data, b.row, b.col, panels, size);
  const int64_t filled = round_up(depth, 2), whole = round_up(depth, kTerms);
  if (filled < whole) {
    for (int64_t j = 0; j < cols; j += kPanel, panels += size) {
      std::fill_n(panels + filled * kPanel, (whole - filled) * kPanel, bfloat16_t{});
    }
  }
}

template <class In, class Out>
class Product {
 public:
  Product(
      int64_t m, int64_t n, int64_t k, Matrix<In> a, Matrix<In> b, const float* bias,
      Activation act, Out* out, int64_t out_row)
      : m_(m),
        n_(n),
        k_(k),
        a_(a),
        b_(b),
        bias_(bias),
        act_(act),
        out_(out),
        out_row_(out_row),
        last_(k % kTerms ? m * kTerms : 0) {
    if (const int64_t rest = k % kTerms; rest > 0) {
      const Scratch<bfloat16_t> memory(rounded_size<In>(m, rest));
      const Matrix<bfloat16_t> from = rounded(m, rest, a.at(0, k - rest), memory.get());
      kernels().bf16_pairs.copy(m, rest, from.data, from.row, from.col, last_.get(), kTerms);
    }
  }

  void by_columns(int64_t threads);
  void by_rows(int64_t threads);

 private:
  // Rows [i, i + rows) and columns [j, j + cols) of the terms [p, p + depth), b packed.
  void pass(
      int64_t i, int64_t rows, int64_t j, int64_t cols, int64_t p, int64_t depth,
      bfloat16_t* a_copy, const bfloat16_t* panels, int64_t size, float* sums,
      int64_t sums_row) const {
    Matrix<bfloat16_t> a = rounded(rows, depth, a_.at(i, p), a_copy + (copies_a() ? kCopySize : 0));
    if (copies_a()) {
      kernels().amx.copy(rows, depth / kTerms * kTerms, a.data, a.row, a.col, a_copy, kCopyRow);
      a = {a_copy, kCopyRow, 1};
    }
    const bool ends = p + depth == k_;
    Out* out = ends ? out_ + i * out_row_ + j : nullptr;
    const auto block = [&] {
      if constexpr (std::is_same_v<Out, float>) {
        return kernels().amx.block_f32;
      } else {
        return kernels().amx.block;
      }
    }();
    block(
        rows, cols, depth, a.data, a.row, last_.get() + i * kTerms, panels, size, sums, sums_row,
        p > 0, ends && bias_ ? bias_ + j : nullptr, act_, out, out_row_);
  }
  bool copies_a() const { return a_.col != 1; }

  // For the rows of one pass: a copy with contiguous rows, and what is rounded.
  int64_t copy_size() const {
    return (copies_a() ? kCopySize : 0) + rounded_size<In>(kRows, kDepth);
  }

  static constexpr int64_t kCopyRow = kDepth + kTerms;  // an odd number of lines
  static constexpr int64_t kCopySize = kRows * kCopyRow;

  int64_t m_, n_, k_;
  Matrix<In> a_, b_;
  const float* bias_;
  Activation act_;
  Out* out_;
  int64_t out_row_;
  Scratch<bfloat16_t> last_;  // the last terms of every row, where they are no whole tile
};

// Each thread packs columns of its own, a pass at a time: what it packs is still in cache then.
template <class In, class Out>
void Product<In, Out>::by_columns(int64_t threads) {
  const int64_t blocks = std::max(threads, ceil_div(n_, kColumns));
  const int64_t cols = std::min(n_, round_up(ceil_div(n_, blocks), kPanel));
  const int64_t size = panel_size(std::min(kDepth, round_up(k_, kTerms)));
  const int64_t sums_row = round_up(cols, kPanel) + kEdge;
  const auto task = [&](int64_t j) {
    const int64_t width = std::min(cols, n_ - j);
    const Scratch<bfloat16_t> panels(ceil_div(width, kPanel) * size);
    const Scratch<float> sums(k_ > kDepth ? m_ * sums_row : 0);
    const Scratch<bfloat16_t> a_copy(copy_size());
    const Scratch<bfloat16_t> memory(rounded_size<In>(kDepth, width));
    for (int64_t p = 0; p < k_; p += kDepth) {
      const int64_t depth = std::min(kDepth, k_ - p);
      pack(depth, width, b_.at(p, j), memory.get(), panels.get(), size);
      pass(0, m_, j, width, p, depth, a_copy.get(), panels.get(), size, sums.get(), sums_row);
    }
  };
  const int64_t tasks = ceil_div(n_, cols);
  if (threads == 1) {
    for (int64_t t = 0; t < tasks; ++t) {
      task(t * cols);
    }
    return;
  }
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      task(t * cols);
    }
  });
}

// All threads pack, and then each computes rows of its own with all that is packed.
template <class In, class Out>
void Product<In, Out>::by_rows(int64_t threads) {
  const bool flat = k_ <= kFlatTerms;
  const int64_t wide = std::min(flat ? kFlatColumns : kColumns, n_), deep = std::min(kDeep, k_);
  const int64_t panels = ceil_div(wide, kPanel), chunks = ceil_div(deep, kDepth);
  const int64_t size = panel_size(std::min(kDepth, round_up(deep, kTerms)));
  // Rows are shared first, as whoever shares columns reads the same rows.
  const int64_t row_shares = std::min(threads, ceil_div(m_, 2 * kEdge));
  const int64_t col_shares = std::min(threads / row_shares, panels);
  const int64_t rows = round_up(ceil_div(m_, row_shares), kEdge);
  const int64_t tasks = row_shares * col_shares;
  const int64_t pass_rows = flat ? kEdge : kRows;
  // Sums of all rows where the terms are packed in several parts, else of those of one pass.
  const bool keeps_all = k_ > deep;
  const int64_t sums_row = round_up(wide, kPanel) + kEdge;
  const int64_t sums_size = k_ > kDepth ? (keeps_all ? rows : std::min(rows, kRows)) * sums_row : 0;

  const Scratch<bfloat16_t> packed(chunks * panels * size);
  const Scratch<float> sums(tasks * sums_size);
  const Scratch<bfloat16_t> a_copies(tasks * copy_size());
  constexpr int64_t kTogether = 4;  // panels that are packed in one go, from runs of 512 bytes
  constexpr int64_t kMemory = rounded_size<In>(kDepth, kTogether * kPanel);
  const Scratch<bfloat16_t> memory(threads * kMemory);  // here, as the region must not throw

  Team::run(threads, [&](const Team& team) {
    for (int64_t j = 0; j < n_; j += wide) {
      const int64_t width = std::min(wide, n_ - j), here = ceil_div(width, kPanel);
      for (int64_t first = 0; first < k_; first += deep) {
        const int64_t terms = std::min(deep, k_ - first), parts = ceil_div(terms, kDepth);
        const int64_t groups = ceil_div(here, kTogether);
        if (j > 0 || first > 0) {
          team.barrier();  // the others have read what is packed over now
        }
        bfloat16_t* own_memory = memory.get() + team.share(threads).first * kMemory;
        const auto [unit, last_unit] = team.share(parts * groups);
        for (int64_t u = unit; u < last_unit; ++u) {
          const int64_t part = u / groups, panel = u % groups * kTogether;
          const int64_t p = first + part * kDepth, at = panel * kPanel;
          pack(
              std::min(kDepth, k_ - p), std::min(kTogether * kPanel, width - at), b_.at(p, j + at),
              own_memory, packed.get() + (part * panels + panel) * size, size);
        }
        team.barrier();
        const auto [task, last_task] = team.share(tasks);
        for (int64_t t = task; t < last_task; ++t) {
          const int64_t begin = t / col_shares * rows, end = std::min(begin + rows, m_);
          const int64_t q = here * (t % col_shares) / col_shares;
          const int64_t q_end = here * (t % col_shares + 1) / col_shares;
          if (q == q_end) {
            continue;
          }
          const int64_t at = q * kPanel, cols = std::min(q_end * kPanel, width) - at;
          for (int64_t i = begin; i < end; i += pass_rows) {
            float* own = sums.get() + t * sums_size + (keeps_all ? (i - begin) * sums_row : 0);
            for (int64_t part = 0; part < parts; ++part) {
              const int64_t p = first + part * kDepth;
              pass(
                  i, std::min(pass_rows, end - i), j + at, cols, p, std::min(kDepth, k_ - p),
                  a_copies.get() + t * copy_size(), packed.get() + (part * panels + q) * size, size,
                  sums_size > 0 ? own : nullptr, sums_row);
            }
          }
        }
      }
    }
  });
}

}  // namespace

template <class In, class Out>
void gemm_amx(
    int64_t m, int64_t n, int64_t k, Matrix<In> a, Matrix<In> b, const float* bias, Activation act,
    Out* out, int64_t out_row, bool alone) {
  const double work = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  const bool small = work <= machine().serial_work_amx;
  const int64_t threads = alone || small ? 1 : Team::threads();
  const int64_t most = k > kDeep ? kMostRows : m;
  for (int64_t i = 0; i < m; i += most) {
    const int64_t rows = std::min(most, m - i);
    Product<In, Out> product(rows, n, k, a.at(i, 0), b, bias, act, out + i * out_row, out_row);
    rows <= kRows ? product.by_columns(threads) : product.by_rows(threads);
  }
}

#define INSTANTIATE(In, Out)                                                                      \
  template void gemm_amx<In, Out>(                                                                \
      int64_t, int64_t, int64_t, Matrix<In>, Matrix<In>, const float*, Activation, Out*, int64_t, \
      bool);
INSTANTIATE(bfloat16_t, bfloat16_t)
INSTANTIATE(bfloat16_t, float)
INSTANTIATE(float, float)
#undef INSTANTIATE

}  // namespace mylayers::cpu
