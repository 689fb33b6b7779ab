#include "gemm_amx.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "ceil_div.h"
#include "scratch.h"
#include "team.h"

namespace mylayers::cpu {

namespace {

// Terms in a row of a tile, which sums are cut at; rows and columns of a tile.
constexpr int64_t kTerms = 32;
constexpr int64_t kEdge = kAmxTileRows;
// Terms of one pass: a panel is then 32 KiB, which stay in level-1 cache while the rows go by.
constexpr int64_t kKc = 256;
// The same of few rows and a b whose columns are runs of memory: those are read a page at a time.
constexpr int64_t kRunKc = 1024;
// Rows of one pass, whose 128 KiB stay in level-2 cache while the panels go by.
constexpr int64_t kRows = kAmxPassRows;
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

constexpr int64_t panel_size(int64_t kc) { return kc * kPanel + kPadding; }

// `kc` rows and `cols` columns of b, with zeros up to whole tiles of terms.
template <class In>
void pack(int64_t kc, int64_t cols, Matrix<In> b, bfloat16_t* panels, int64_t size) {
  if constexpr (std::is_same_v<In, float>) {
    kernels().amx.pack_rounded(kc, cols, b.data, b.row, b.col, panels, size);
  } else {
    kernels().bf16_vnni.pack_vnni(kc, cols, b.data, b.row, b.col, panels, size);
  }
  const int64_t filled = round_up(kc, 2), whole = round_up(kc, kTerms);
  if (filled < whole) {
    for (int64_t j = 0; j < cols; j += kPanel, panels += size) {
      std::fill_n(panels + filled * kPanel, (whole - filled) * kPanel, bfloat16_t{});
    }
  }
}

template <class In>
void copy(int64_t rows, int64_t k, Matrix<In> a, bfloat16_t* out, int64_t ld_out) {
  if constexpr (std::is_same_v<In, float>) {
    kernels().amx.copy_rounded(rows, k, a.data, a.row, a.col, out, ld_out);
  } else {
    kernels().amx.copy(rows, k, a.data, a.row, a.col, out, ld_out);
  }
}

template <class In, class Out>
class Product {
 public:
  Product(
      int64_t m, int64_t n, int64_t k, Matrix<In> a, Matrix<In> b, const float* bias,
      Activation act, Out* out, int64_t ld_out)
      : m_(m),
        n_(n),
        k_(k),
        a_(a),
        b_(b),
        bias_(bias),
        act_(act),
        out_(out),
        ld_out_(ld_out),
        by_runs_(m <= kEdge && b.col != 1),
        deepest_(std::min(by_runs_ ? kRunKc : kKc, round_up(k, kTerms))),
        copy_row_(deepest_ + kTerms),
        last_(k % kTerms ? m * kTerms : 0) {
    if (const int64_t rest = k % kTerms; rest > 0) {
      copy(m, rest, a.at(0, k - rest), last_.get(), kTerms);
    }
  }

  void by_columns(int64_t threads);
  void by_rows(int64_t threads);

 private:
  // Rows [i, i + rows) and columns [j, j + cols) of the terms [p, p + kc), b packed.
  void pass(
      int64_t i, int64_t rows, int64_t j, int64_t cols, int64_t p, int64_t kc, bfloat16_t* a_copy,
      const bfloat16_t* panels, int64_t size, float* sums, int64_t ld_sums) const {
    const Matrix<In> from = a_.at(i, p);
    Matrix<bfloat16_t> a = {a_copy, copy_row_, 1};
    if (copies_a()) {
      copy(rows, kc / kTerms * kTerms, from, a_copy, copy_row_);
    } else if constexpr (!std::is_same_v<In, float>) {
      a = from;
    }
    const bool ends = p + kc == k_;
    Out* out = ends ? out_ + i * ld_out_ + j : nullptr;
    const auto macrokernel = [&] {
      if constexpr (std::is_same_v<Out, float>) {
        return kernels().amx.macrokernel_f32;
      } else {
        return kernels().amx.macrokernel;
      }
    }();
    macrokernel(
        rows, cols, kc, a.data, a.row, last_.get() + i * kTerms, panels, size, sums, ld_sums, p > 0,
        ends && bias_ ? bias_ + j : nullptr, act_, out, ld_out_);
  }
  // For the rows of one pass: a copy with contiguous rows of bfloat16.
  bool copies_a() const { return std::is_same_v<In, float> || a_.col != 1; }
  int64_t copy_size() const { return copies_a() ? std::min(m_, kRows) * copy_row_ : 0; }

  int64_t m_, n_, k_;
  Matrix<In> a_, b_;
  const float* bias_;
  Activation act_;
  Out* out_;
  int64_t ld_out_;
  bool by_runs_;
  int64_t deepest_;           // terms of one pass
  int64_t copy_row_;          // of a copy of a: an odd number of lines
  Scratch<bfloat16_t> last_;  // the last terms of every row, where they are no whole tile
};

// Each thread packs columns of its own, a pass at a time: what it packs is still in cache then.
template <class In, class Out>
void Product<In, Out>::by_columns(int64_t threads) {
  const int64_t blocks = std::max(threads, ceil_div(n_, by_runs_ ? kPanel : kColumns));
  const int64_t cols = std::min(n_, round_up(ceil_div(n_, blocks), kPanel));
  const int64_t size = panel_size(deepest_);
  const int64_t ld_sums = round_up(cols, kPanel) + kEdge;
  const auto task = [&](int64_t j) {
    const int64_t width = std::min(cols, n_ - j);
    const Scratch<bfloat16_t> panels(ceil_div(width, kPanel) * size);
    const Scratch<float> sums(k_ > deepest_ ? m_ * ld_sums : 0);
    const Scratch<bfloat16_t> a_copy(copy_size());
    for (int64_t p = 0; p < k_; p += deepest_) {
      const int64_t kc = std::min(deepest_, k_ - p);
      pack(kc, width, b_.at(p, j), panels.get(), size);
      pass(0, m_, j, width, p, kc, a_copy.get(), panels.get(), size, sums.get(), ld_sums);
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
  const int64_t panels = ceil_div(wide, kPanel), chunks = ceil_div(deep, deepest_);
  const int64_t size = panel_size(deepest_);
  // Rows are shared first, as whoever shares columns reads the same rows.
  const int64_t row_shares = std::min(threads, ceil_div(m_, 2 * kEdge));
  const int64_t col_shares = std::min(threads / row_shares, panels);
  const int64_t rows = round_up(ceil_div(m_, row_shares), kEdge);
  const int64_t tasks = row_shares * col_shares;
  const int64_t pass_rows = flat ? kEdge : kRows;
  // Sums of all rows where the terms are packed in several parts, else of those of one pass.
  const bool keeps_all = k_ > deep;
  const int64_t ld_sums = round_up(wide, kPanel) + kEdge;
  const int64_t sums_size =
      k_ > deepest_ ? (keeps_all ? rows : std::min(rows, kRows)) * ld_sums : 0;

  const Scratch<bfloat16_t> packed(chunks * panels * size);
  const Scratch<float> sums(tasks * sums_size);
  const Scratch<bfloat16_t> a_copies(tasks * copy_size());
  constexpr int64_t kTogether = 4;  // panels that are packed in one go, from runs of 512 bytes

  Team::run(threads, [&](const Team& team) {
    for (int64_t j = 0; j < n_; j += wide) {
      const int64_t width = std::min(wide, n_ - j), here = ceil_div(width, kPanel);
      for (int64_t first = 0; first < k_; first += deep) {
        const int64_t terms = std::min(deep, k_ - first), parts = ceil_div(terms, deepest_);
        const int64_t groups = ceil_div(here, kTogether);
        if (j > 0 || first > 0) {
          team.barrier();  // the others have read what is packed over now
        }
        const auto [unit, last_unit] = team.share(parts * groups);
        for (int64_t u = unit; u < last_unit; ++u) {
          const int64_t part = u / groups, panel = u % groups * kTogether;
          const int64_t p = first + part * deepest_, at = panel * kPanel;
          pack(
              std::min(deepest_, k_ - p), std::min(kTogether * kPanel, width - at),
              b_.at(p, j + at), packed.get() + (part * panels + panel) * size, size);
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
            float* own = sums.get() + t * sums_size + (keeps_all ? (i - begin) * ld_sums : 0);
            for (int64_t part = 0; part < parts; ++part) {
              const int64_t p = first + part * deepest_;
              pass(
                  i, std::min(pass_rows, end - i), j + at, cols, p, std::min(deepest_, k_ - p),
                  a_copies.get() + t * copy_size(), packed.get() + (part * panels + q) * size, size,
                  sums_size > 0 ? own : nullptr, ld_sums);
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
    Out* out, int64_t ld_out, int64_t threads) {
  const int64_t most = k > kDeep ? kMostRows : m;
  for (int64_t i = 0; i < m; i += most) {
    const int64_t rows = std::min(most, m - i);
    Product<In, Out> product(rows, n, k, a.at(i, 0), b, bias, act, out + i * ld_out, ld_out);
    rows <= kRows ? product.by_columns(threads) : product.by_rows(threads);
  }
}

#define INSTANTIATE(In, Out)                                                                      \
  template void gemm_amx<In, Out>(                                                                \
      int64_t, int64_t, int64_t, Matrix<In>, Matrix<In>, const float*, Activation, Out*, int64_t, \
      int64_t);
INSTANTIATE(bfloat16_t, bfloat16_t)
INSTANTIATE(bfloat16_t, float)
INSTANTIATE(float, float)
#undef INSTANTIATE

}  // namespace mylayers::cpu
