#include "gemm.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <type_traits>

namespace mylayers::cpu {
namespace {

constexpr int64_t kRowBlock = 240;    // rows of a per task: 240 x 256 float32 fit level-2 cache
constexpr int64_t kDepthBlock = 256;  // rows of a panel of b: 256 x 64 float32 are 64 KiB
constexpr int64_t kTileRows = 6;
constexpr int64_t kWidestLane = 16;
// Multiply-adds below which a second thread costs more than it saves.
constexpr int64_t kSerialWork = int64_t{1} << 19;
// Long sums are cut into pieces of at least this many terms.
constexpr int64_t kLongPiece = 2048;
constexpr int64_t kMostPieces = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class C>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : memory_(
            count > 0 ? c10::GetCPUAllocator()->allocate(count * static_cast<int64_t>(sizeof(C)))
                      : c10::DataPtr()) {}
  C* get() const { return static_cast<C*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

// act(a (m, k) @ b (k, n) + bias) into c, on this thread. Out is T, or acc_t<T> for
// partial sums (then bias must be null).
template <class T, class Out>
void gemm_serial(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias, Activation act,
    Out* c, int64_t c_row) {
  using C = acc_t<T>;
  const auto& product = kernels().product<C>();
  const auto& storage = kernels().storage<T>();
  constexpr bool kWiden = !std::is_same_v<T, C>;     // 16-bit input: widen while packing
  constexpr bool kNarrow = !std::is_same_v<Out, C>;  // 16-bit output: sum in scratch
  const bool pack_b = kWiden || b.col != 1;

  const Scratch<C> b_panel(pack_b ? std::min(k, kDepthBlock) * kPanel : 0);
  const Scratch<C> a_wide(kWiden ? m * k : 0);
  const Scratch<C> c_wide(kNarrow ? m * std::min(n, kPanel) : 0);
  if constexpr (kWiden) {
    storage.pack(m, k, a.data, a.row, a.col, a_wide.get(), k);
  }
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t cols = std::min(kPanel, n - j);
    C* sums;
    int64_t sums_row;
    if constexpr (kNarrow) {
      sums = c_wide.get();
      sums_row = cols;
    } else {
      sums = c + j;
      sums_row = c_row;
    }
    int64_t p = 0;
    do {  // once even for k = 0: the result is then act(bias)
      const int64_t depth = std::min(kDepthBlock, k - p);
      const bool last = p + depth == k;
      const Matrix<T> b_block = b.at(p, j);
      const C* b_data;
      int64_t b_row = b.row;
      if (pack_b) {
        b_row = round_up(cols, kWidestLane);
        storage.pack(depth, cols, b_block.data, b.row, b.col, b_panel.get(), b_row);
        b_data = b_panel.get();
      }
      const C* a_data;
      int64_t a_row, a_col;
      const C* add = nullptr;
      if constexpr (kWiden) {
        a_data = a_wide.get() + p;
        a_row = k;
        a_col = 1;
      } else {
        a_data = a.at(0, p).data;
        a_row = a.row;
        a_col = a.col;
        b_data = pack_b ? b_data : b_block.data;
        add = bias ? bias + j : nullptr;
      }
      product.block(
          m, cols, depth, a_data, a_row, a_col, b_data, b_row, sums, sums_row, p > 0,
          !kNarrow && last, add, act);
      p += depth;
    } while (p < k);
    if constexpr (kNarrow) {
      storage.finish(m, cols, sums, sums_row, bias ? bias + j : nullptr, act, c + j, c_row);
    }
  }
}

}  // namespace

template <class T>
void gemm(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias, Activation act,
    T* c) {
  if (m == 0 || n == 0) {
    return;
  }
  const bool alone = m * n * std::max<int64_t>(k, 1) <= kSerialWork || at::in_parallel_region();
  const int64_t threads = alone ? 1 : at::get_num_threads();
  // Rows go to the threads first, in blocks of equal size and number; panels of columns
  // only where there are too few rows. Bits do not depend on this choice.
  int64_t row_blocks = ceil_div(m, kRowBlock);
  if (m >= threads * 4 * kTileRows) {
    row_blocks = round_up(row_blocks, threads);
  }
  const int64_t rows = round_up(ceil_div(m, row_blocks), m > kTileRows ? kTileRows : 1);
  row_blocks = ceil_div(m, rows);
  const int64_t col_blocks =
      std::clamp<int64_t>(ceil_div(threads, row_blocks), 1, ceil_div(n, kPanel));
  const int64_t cols = round_up(ceil_div(n, col_blocks), kPanel);
  const auto task = [&](int64_t t) {
    const int64_t i = t % row_blocks * rows, j = t / row_blocks * cols;
    if (j < n) {
      gemm_serial<T, T>(
          std::min(rows, m - i), std::min(cols, n - j), k, a.at(i, 0), b.at(0, j),
          bias ? bias + j : nullptr, act, c + i * n + j, n);
    }
  };
  const int64_t tasks = row_blocks * col_blocks;
  if (threads == 1) {
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
  // A result this large keeps the threads busy without cutting its sums.
  constexpr int64_t kLargeResult = 256 * 256;
  const int64_t piece = std::max(kLongPiece, round_up(ceil_div(k, kMostPieces), kDepthBlock));
  const int64_t pieces = ceil_div(k, piece);
  if (pieces < 2 || m * n > kLargeResult) {
    gemm<T>(m, n, k, a, b, nullptr, Activation::kNone, c);
    return;
  }
  const Scratch<C> partial(pieces * m * n);
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t p = s * piece;
      gemm_serial<T, C>(
          m, n, std::min(piece, k - p), a.at(0, p), b.at(p, 0), nullptr, Activation::kNone,
          partial.get() + s * m * n, n);
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

#define INSTANTIATE(T)                                                            \
  template void gemm<T>(                                                          \
      int64_t, int64_t, int64_t, Matrix<T>, Matrix<T>, const T*, Activation, T*); \
  template void gemm_long<T>(int64_t, int64_t, int64_t, Matrix<T>, Matrix<T>, T*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(half_t)
INSTANTIATE(bfloat16_t)
#undef INSTANTIATE

}  // namespace mylayers::cpu
