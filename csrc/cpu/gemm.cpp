#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "ceil_div.h"
#include "gemm_amx.h"
#include "gemm_aten.h"
#include "machine/tuning.h"
#include "scratch.h"

namespace mylayers::cpu {

namespace {

// Rows that lie a multiple of this apart share their sets of the caches.
constexpr int64_t kCollision = 4096;
// Lanes of the widest vector: columns are cut at multiples.
constexpr int64_t kWidestLane = 16;
// Bits depend on where long sums are cut: into pieces of at least this many terms, and no more of
// them, at multiples.
constexpr int64_t kLongPiece = 2048;
constexpr int64_t kMostPieces = 64;
constexpr int64_t kPieceMultiple = 256;

// From one row to the next, so that rows do not lie in the same sets of the caches: an odd number
// of lines, of float32.
int64_t apart(int64_t cols) { return round_up(cols, 32) + 16; }

// Whether k rows of b span that much.
template <class T>
bool spans(int64_t bytes, int64_t k, const Matrix<T>& b) {
  return k * b.row * static_cast<int64_t>(sizeof(T)) >= bytes;
}

// What multiplies bfloat16: AMX; else, of AVX512-BF16, tiles of pairs in registers; else float32.
template <class T>
bool uses_amx() {
  return std::is_same_v<T, bfloat16_t> && machine().bf16 == Bf16Units::kAmx;
}
template <class T>
bool uses_pair_tiles() {
  return std::is_same_v<T, bfloat16_t> && machine().bf16 == Bf16Units::kDot;
}

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

// Weights of so many values, and no fewer columns or terms than a panel has, are rounded where
// PyTorch's setting allows it: smaller ones are as fast in float32. The rows have no say, as their
// bits would depend on how many there are.
constexpr int64_t kRoundedWeight = 1 << 18;

// Whether float32 is multiplied as bfloat16, summed in float32: where
// torch.set_float32_matmul_precision("medium") or torch.backends.mkldnn.matmul.fp32_precision =
// "bf16" let PyTorch's own products do so, on AMX.
bool rounds_float32(int64_t n, int64_t k) {
  return n >= kPanel && k >= kPanel && n * k >= kRoundedWeight &&
         machine().bf16 == Bf16Units::kAmx &&
         at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL) ==
             at::Float32Precision::BF16;
}

// As gemm_serial_bf16, for few rows of a and our own instructions, b as it lies in memory.
template <class Out>
void stream_bf16(
    int64_t m, int64_t n, int64_t k, Matrix<bfloat16_t> a, Matrix<bfloat16_t> b, Source source,
    const bfloat16_t* bias, Activation act, Out* c, int64_t c_row) {
  const auto& pairs = kernels().bf16_pairs;
  const bool many = m > kStreamRows;
  const bool copy_a = many || a.col != 1 || k % 2 != 0;
  const int64_t width = many ? 2 * apart((k + 1) / 2) : round_up(k, 2);
  const Scratch<bfloat16_t> a_rows(copy_a ? m * width : 0);
  if (copy_a) {
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

// As gemm_serial, in tiles of pairs. They have one order of adding however the terms are cut, so
// here too a row's bits are its own.
template <class Out>
void gemm_serial_bf16(
    int64_t m, int64_t n, int64_t k, Matrix<bfloat16_t> a, Matrix<bfloat16_t> b, Source source,
    const bfloat16_t* bias, Activation act, Out* c, int64_t c_row) {
  const auto& pairs = kernels().bf16_pairs;
  if (m <= machine().pair_skinny_max_rows && b.col == 1 && n > kPanel) {
    return stream_bf16(m, n, k, a, b, source, bias, act, c, c_row);
  }
  const int64_t panels = ceil_div(n, kPanel);
  const int64_t block = std::max(
      machine().pair_min_depth, machine().packed_pairs / (panels * kPanel) / 2 * 2);
  const int64_t widest = std::min(round_up(k, 2), block);
  // Four lines more than a panel has: the next one would lie in the same sets of the caches.
  const int64_t panel_size = widest * kPanel + 2 * kPanel;
  const bool copy_a = a.col != 1 || k % 2 != 0;
  const bool rounds_in_tile = std::is_same_v<Out, bfloat16_t> && fits_in_tile(act);
  // A transposed copy writes a line of every row in turn: 1.08 times the time of a whole weight
  // gradient of 1024 x 1024 x 1024 while rows lay in the same sets.
  const int64_t a_row = 2 * apart(widest / 2);
  const Scratch<bfloat16_t> a_rows(copy_a ? m * a_row : 0);
  const Scratch<bfloat16_t> b_panels(panels * panel_size);
  const bool keeps_sums = !rounds_in_tile || k > widest;
  const Scratch<float> sums(keeps_sums ? panels * m * kPanel : 0);
  for (int64_t p = 0; p < k; p += block) {
    const int64_t depth = std::min(block, k - p), even_depth = round_up(depth, 2);
    Matrix<bfloat16_t> a_in = a.at(0, p);
    if (copy_a) {
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

// Where b (k, n), of which a task reads a part, is likely to be. Networks of eight layers of 1024 x
// 1024 took 1.25 to 2.5 times as long at 1 to 32 rows while the size of one layer decided, of four
// layers 1.1 to 2.2 times; two layers stay in the cache. A weight (out, in) is asked for line by
// line: eight layers of 1000 x 1000 gain 1.04 to 1.57, four, which a cache of 32 MiB holds, took
// 1.04 to 1.14 times as long, and on a Zen 4 networks whose rows collide up to 1.27 times.
template <class T>
Source source_of(int64_t k, int64_t n, const Matrix<T>& b, int64_t in_turn) {
  const Source memory = machine().memory;
  const int64_t bytes = machine().memory_bytes;
  if (b.col == 1) {
    return in_turn >= bytes || spans(bytes, k, b) ? memory : Source::kCache;
  }
  const bool collide = b.col * static_cast<int64_t>(sizeof(T)) % kCollision == 0;
  const bool far = in_turn >= 2 * bytes || spans(bytes, n, b.transposed());
  const bool asks = memory != Source::kMemoryByLevel2 || !collide;
  return far && asks ? memory : Source::kCache;
}

// Whether m rows stream b, with stream_many.
template <class T>
bool streams_many(int64_t m, int64_t k, const Matrix<T>& b, Source source) {
  const Tuning& rows = machine();
  constexpr bool kNarrow = !std::is_same_v<T, acc_t<T>>;
  const int64_t most = source != Source::kCache        ? rows.skinny_max_rows_memory
                       : kNarrow                       ? rows.skinny_max_rows_16bit
                       : spans(rows.level2_bytes, k, b) ? rows.skinny_max_rows_l2_miss
                                                       : 0;
  return m > kStreamRows && m <= most && b.col == 1;
}

// Whether tiles of m rows copy what they share of b.
template <class T>
bool copies_b(int64_t m, int64_t k, const Matrix<T>& b) {
  const Tuning& tuning = machine();
  const bool many = m >= tuning.copying_min_rows;
  return tuning.copying_min_rows && b.col == 1 &&
         spans(many ? tuning.level1_bytes : tuning.level2_bytes, k, b);
}

// Whether m rows are multiplied in bands (gemm_bands): with a large b, of which strips that follow
// each other in memory come from level-2 cache faster than pieces of its rows; and where few terms
// make a product all writing, as tiles otherwise write short pieces of many rows.
template <class T>
bool takes_bands(int64_t m, int64_t n, int64_t k, const Matrix<T>& b) {
  if (uses_pair_tiles<T>()) {
    return false;
  }
  constexpr bool kWiden = !std::is_same_v<T, acc_t<T>>;
  const Tuning& tuning = machine();
  const bool large =
      spans(tuning.level2_bytes, k, b) || spans(tuning.level2_bytes, n, b.transposed());
  if (tuning.bands_min_rows > 0 && m >= tuning.bands_min_rows && n > kPanel && k > kStreamDepth &&
      large) {
    return true;
  }
  const int64_t least = kWiden ? 1 : kStreamDepth + 1;
  const int64_t most =
      std::max(tuning.bands_max_terms, kWiden ? tuning.bands_max_terms_16bit : 0);
  return n >= tuning.task_columns && m >= tuning.bands_flat_min_rows && k >= least && k <= most;
}

// Whether tiles of n columns copy what they share of a.
template <class T>
bool copies_a(int64_t m, int64_t n, int64_t k, const Matrix<T>& a) {
  const bool apart =
      a.col == 1 ? a.row * sizeof(T) % kCollision == 0
                 : spans(machine().level1_bytes, k, a.transposed());
  return machine().copying_min_rows && m > kernels().product<acc_t<T>>().rows &&
         n >= machine().copying_min_columns && apart;
}

// Rows and columns of one task of gemm, at most; their numbers change no bit.
template <class T>
int64_t row_block(int64_t m, int64_t n, int64_t k, const Matrix<T>& b) {
  return uses_pair_tiles<T>()     ? machine().pair_task_rows
         : takes_bands(m, n, k, b) ? machine().bands_task_rows
                                   : machine().task_rows;
}

template <class T>
int64_t column_block(int64_t m, int64_t k, const Matrix<T>& b, Source source) {
  const bool streams = m <= kStreamRows && k > kStreamDepth && b.col == 1;
  const Tuning& tuning = machine();
  const int64_t many = tuning.skinny_many_sums / m, least = tuning.task_columns;
  return streams                          ? tuning.skinny_sums / m
         : uses_pair_tiles<T>()           ? std::clamp(many, least, tuning.pair_max_columns)
         : streams_many(m, k, b, source) ? std::clamp(many, least, tuning.skinny_max_columns)
                                          : least;
}

// Passes of equal depth, as near to `deepest` as they can be: a short last one would load and store
// every sum for little.
int64_t pass_depth(int64_t k, int64_t deepest) {
  return ceil_div(k, std::max<int64_t>(1, (k + deepest / 2) / deepest));
}

// As gemm_serial, the rows of one tile at a time with all columns of a packed b.
template <class T, class Out>
void gemm_bands(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias, Activation act,
    Out* c, int64_t c_row) {
  using C = acc_t<T>;
  constexpr bool kWiden = !std::is_same_v<T, C>, kNarrow = !std::is_same_v<Out, C>;
  const auto& product = kernels().product<C>();
  const auto& storage = kernels().storage<T>();
  const int64_t band = product.rows, widest = pass_depth(k, machine().depth);
  const bool copy_a = kWiden || a.col != 1;
  const Scratch<C> strips(widest * round_up(n, product.strip));
  const Scratch<C> a_rows(copy_a ? m * widest : 0);
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
    if (copy_a) {
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
          rows, n, depth, a_in.at(i, 0).data, a_in.row, a_in.col, /*first=*/!copy_a, strips.get(),
          0,
          /*in_strips=*/true, sums, kNarrow ? n : c_row, p > 0, ends && !kNarrow, add, act, {});
      if constexpr (kNarrow) {
        if (ends) {
          storage.finish(rows, n, sums, n, bias, act, c + i * c_row, c_row);
        }
      }
    }
  }
}

// act(a (m, k) @ b (k, n) + bias) into c, on this thread. Out is T, or acc_t<T> for partial sums
// (then bias must be null).
template <class T, class Out>
void gemm_serial(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, Source source, const T* bias,
    Activation act, Out* c, int64_t c_row) {
  using C = acc_t<T>;
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    if (k > 0 && uses_amx<T>()) {
      const WideBias wide(n, bias);
      return gemm_amx<T, Out>(m, n, k, a, b, wide.get(), act, c, c_row, /*alone=*/true);
    }
    if (k > 0 && uses_pair_tiles<T>()) {
      return gemm_serial_bf16(m, n, k, a, b, source, bias, act, c, c_row);
    }
  }
  const auto& product = kernels().product<C>();
  const auto& storage = kernels().storage<T>();
  constexpr bool kWiden = !std::is_same_v<T, C>;     // 16-bit input: widen while packing
  constexpr bool kNarrow = !std::is_same_v<Out, C>;  // 16-bit output: sum in scratch
  if constexpr (!kWiden) {
    if (m <= kStreamRows && b.row == 1 && b.col != 1) {
      const Scratch<C> rows(a.col == 1 ? 0 : m * k);
      if (a.col != 1) {
        storage.pack(m, k, a.data, a.row, a.col, rows.get(), k);
        a = {rows.get(), k, 1};
      }
      return product.transposed(m, n, k, a.data, a.row, b.data, b.col, source, c, c_row, bias, act);
    }
  }
  // Columns from which streaming outruns tiles: a sum of few rows stays in a tile's registers, one
  // of few terms is all writing.
  const int64_t least = m <= kStreamRows                   ? kPanel + 1
                        : !kWiden && 2 * k <= kStreamDepth ? kPanel / 2
                        : !kWiden && k <= kStreamDepth     ? kPanel
                                                           : INT64_MAX;
  const bool streams = n >= least && b.col == 1 && k > 0;
  const bool many = !streams && n > kPanel && k > 0 && streams_many(m, k, b, source);
  if (!streams && !many && takes_bands(m, n, k, b)) {
    return gemm_bands<T, Out>(m, n, k, a, b, bias, act, c, c_row);
  }
  const bool copy_a = kWiden || many;
  const bool tiles = !streams && !many;
  const bool pack_b = tiles && (kWiden || b.col != 1);
  const bool keep_a = tiles && !kWiden && copies_a(m, n, k, a);
  const bool keep_b = tiles && !kWiden && copies_b(m, k, b);
  const bool in_scratch = kNarrow || many;

  const bool deep = keep_b || (m <= machine().shallow_rows && !many);
  const int64_t widest = pass_depth(k, deep ? 2 * machine().depth : machine().depth);

  const Scratch<C> b_panel(widest * (pack_b ? kPanel : keep_b ? product.strip : 0));
  const Scratch<C> a_tiles(keep_a ? m * widest : 0);
  const Copies<C> copies = {keep_a ? a_tiles.get() : nullptr, keep_b ? b_panel.get() : nullptr};
  const int64_t a_row = many ? apart(widest) : widest;
  const Scratch<C> a_rows(copy_a ? m * a_row : 0);
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
    if (copy_a) {
      storage.pack(m, depth, a.at(0, p).data, a.row, a.col, a_rows.get(), a_row);
      a_in = {a_rows.get(), a_row, 1};
    } else if constexpr (!kWiden) {
      a_in = a.at(0, p);
    }
    if (streams) {
      storage.stream(
          m, n, depth, a_in.data, a_in.row, a_in.col, b.at(p, 0).data, b.row, source, sums,
          sums_row, p > 0, finish, add, act);
    } else if (many) {
      storage.stream_many(
          m, n, depth, a_in.data, a_in.row, b.at(p, 0).data, b.row, source, sums, sums_row, p > 0);
    } else {
      const int64_t panel = pack_b ? kPanel : n;
      for (int64_t j = 0; j < n; j += panel) {
        const int64_t cols = std::min(panel, n - j);
        const C* b_in = b_panel.get();
        if (pack_b) {
          storage.pack_strips(depth, cols, b.at(p, j).data, b.row, b.col, m, b_panel.get());
        } else if constexpr (!kWiden) {
          b_in = b.at(p, j).data;
        }
        product.block(
            m, cols, depth, a_in.data, a_in.row, a_in.col, j == 0, b_in, b.row, pack_b, sums + j,
            sums_row, p > 0, finish, add ? add + j : nullptr, act, copies);
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

}  // namespace

namespace {

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
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    if (k > 0 && uses_amx<T>()) {
      const WideBias wide(n, bias);
      return gemm_amx<T, T>(m, n, k, a, b, wide.get(), act, c, n, at::in_parallel_region());
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    if (rounds_float32(n, k)) {
      const Scratch<float> a_rows(has_unit_stride(a) ? 0 : m * k);
      const Scratch<float> b_rows(has_unit_stride(b) ? 0 : k * n);
      return gemm_amx<T, T>(
          m, n, k, with_unit_stride(m, k, a, a_rows.get()), with_unit_stride(k, n, b, b_rows.get()),
          bias, act, c, n, at::in_parallel_region());
    }
  }
  const Source source = source_of(k, n, b, in_turn);
  const int64_t tile = kernels().product<acc_t<T>>().rows;
  const double work = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  const bool alone = work <= machine().serial_work || at::in_parallel_region();
  const int64_t threads = alone ? 1 : at::get_num_threads();
  // As many tasks as keep every thread busy to the end. Columns are split before rows, because
  // tasks that share columns of b each pack them. Bits do not depend on this choice.
  int64_t row_blocks = ceil_div(m, row_block(m, n, k, b));
  int64_t col_blocks = ceil_div(n, column_block(m, k, b, source));
  if (row_blocks * col_blocks % threads != 0) {
    if (n >= threads * 2 * kPanel || m < threads * 4 * tile) {
      col_blocks = round_up(col_blocks, threads);
    } else {
      row_blocks = round_up(row_blocks, threads);
    }
  }
  // A sum of few terms is all writing: bands of whole rows, each band one run of memory. Tasks of
  // 512 columns had two threads fault in, and zero, the same pages of 2 MiB: a fresh 4096 x 4096
  // float32 result took 1.3 to 1.4 times as long, on one thread as well.
  const bool few_terms = std::is_same_v<T, acc_t<T>> && k <= kStreamDepth;
  const int64_t few = std::max(machine().bands_max_terms, machine().bands_max_terms_16bit);
  const bool flat = k <= few && takes_bands(m, n, k, b);
  if ((few_terms || flat) && m >= threads * tile) {
    col_blocks = 1;
    row_blocks = round_up(ceil_div(m, machine().task_rows), threads);
  }
  // Whole tiles; equal tasks come first, so that columns are cut in whole vectors: of 257 in whole
  // panels one thread had 192.
  const int64_t multiple = m / row_blocks >= tile ? tile : 1;
  const int64_t rows = round_up(ceil_div(m, row_blocks), multiple);
  const int64_t cols = round_up(ceil_div(n, col_blocks), kWidestLane);
  row_blocks = ceil_div(m, rows);
  col_blocks = ceil_div(n, cols);
  const auto task = [&](int64_t t) {
    const int64_t i = t % row_blocks * rows, j = t / row_blocks * cols;
    gemm_serial<T, T>(
        std::min(rows, m - i), std::min(cols, n - j), k, a.at(i, 0), b.at(0, j), source,
        bias ? bias + j : nullptr, act, c + i * n + j, n);
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
  if (m == 0 || n == 0) {
    return;
  }
  // A result this large keeps the threads busy without cutting its sums.
  constexpr int64_t kLargeResult = 256 * 256;
  const int64_t piece = std::max(kLongPiece, round_up(ceil_div(k, kMostPieces), kPieceMultiple));
  const int64_t pieces = ceil_div(k, piece);
  if (pieces < 2 || m * n > kLargeResult || is_aten_product(m, n, k)) {
    gemm<T>(m, n, k, a, b, nullptr, Activation::kNone, c);
    return;
  }
  const Scratch<C> partial(pieces * m * n);
  // As from memory for few rows alone: more would stream their pieces, and 131072 x 16 x 300 took
  // 1.06 times as long.
  const Source source = source_of(m <= kStreamRows ? k : piece, n, b, /*in_turn=*/0);
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t p = s * piece;
      gemm_serial<T, C>(
          m, n, std::min(piece, k - p), a.at(0, p), b.at(p, 0), source, nullptr, Activation::kNone,
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
