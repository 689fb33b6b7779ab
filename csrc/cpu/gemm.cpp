#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <exception>
#include <type_traits>

#include "scratch.h"

#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__x86_64__)
#include <cpuid.h>
#define MYLAYERS_BRGEMM 1
#else
#define MYLAYERS_BRGEMM 0
#endif

namespace mylayers::cpu {

// Through oneDNN's generated micro-kernels, as PyTorch calls them: they outrun widening to
// float32 twice on AVX512-BF16, and reach AMX. DNNL_MAX_CPU_ISA may forbid what the processor
// could do, so one product is tried; where it is forbidden oneDNN throws an exception of its own.
bool has_bf16_units() {
#if MYLAYERS_BRGEMM
  static const bool usable = [] {
    if (!__builtin_cpu_supports("avx512bf16")) {  // AMX never comes without it
      return false;
    }
    const at::BFloat16 a[2] = {1, 2};
    const at::BFloat16 b[2 * kPanel] = {3, 4};
    float c[kPanel];
    try {
      at::native::cpublas::brgemm(1, 16, 2, 2, kPanel, kPanel, false, a, b, c);
      at::native::cpublas::brgemm_release();
    } catch (const std::exception&) {
      return false;
    }
    return c[0] == 11;
  }();
  return usable && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

namespace {

// One task: at most this many rows of a and columns of b. Its share of the output, of a for one
// depth and of b where that is packed then stay in level-2 cache, while rows of b are read in
// runs of 2 KiB (512 bytes for brgemm, whose panels are packed one depth at a time).
constexpr int64_t kRowBlock = 256;
constexpr int64_t kColumnBlock = 512;
constexpr int64_t kUnitColumns = 256;
// Tasks of our own bfloat16 tiles are higher, as each packs its share of the weight: 1024 x 1024 x
// 1024 took 1.02 to 1.07 times as long in 256 rows, 1024 x 256 x 256 1.02 to 1.05. In float16,
// whose sums lie in scratch memory of 1 MiB then, 1024 x 256 x 256 took 2.3 times as long.
constexpr int64_t kPairRowBlock = 1024;
// A task that streams has this many sums, 32 KiB of float32: it reads runs as long as level-1 cache
// allows. One row of 4096 x 4096, on one thread: 2.4 ms in runs of 2 KiB, 2.1 in whole rows; 4 rows
// of 1024 x 1024: 90 and 61 us.
constexpr int64_t kStreamSums = 8192;
// One of more rows has this many, 256 KiB.
constexpr int64_t kSums = 1 << 16;
// A weight that spans so much is likely to come from memory. Few rows wait for it, and stream it:
// 16 rows of 4096 x 4096 took 1.2 to 1.3 times as long in float32, and twice in float16, while
// tiles touched 256 bytes of a row at a time. From a cache float32 is read as fast by tiles, whose
// sums stay in registers; kernels().tuning says up to how many rows streaming pays.
constexpr int64_t kFarBytes = 16 << 20;
// One that spans so much leaves level-2 cache, or level 1.
constexpr int64_t kNearBytes = 1 << 20;
constexpr int64_t kLevel1Bytes = 1 << 15;
// Rows that lie a multiple of this apart share their sets of the caches.
constexpr int64_t kCollision = 4096;
// Columns that pay for a copy of a: 100 x 784 x 100 took 1.05 times as long with one.
constexpr int64_t kCopyingColumns = 128;
// Up to so many rows bfloat16 is paired on the way: 16 rows of 1024 x 1024 took 1.13 times as long
// with packed pairs, 32 no longer.
constexpr int64_t kManyPairRows = 16;
// Rows of b per pass over the task, about: 256 x 64 float32, a panel, are 64 KiB. Up to
// kShallowRows rows of a, and tiles that copy b, go twice as deep, to load and store their sums
// half as often: 1.02 to 1.04 times as fast.
constexpr int64_t kDepthBlock = 256;
constexpr int64_t kShallowRows = 32;
// Rows of one call of a matrix unit's kernel. One is generated and kept for each number of rows,
// so the rest is cut into powers of two.
constexpr int64_t kUnitRows = 64;
constexpr int64_t kUnitDepth = 512;
// Pairs are packed for so many columns and so deep, few rows taking long runs of b. Only one panel
// of them (128 KiB) and the rows of a are read again and again: 4096 x 1024 x 1024 took 1.07 times
// as long in tasks of 256 columns, 512 deep, that stay in level-2 cache as a whole.
constexpr int64_t kPackedPairs = 1 << 19;
constexpr int64_t kMostPairColumns = 1024;
constexpr int64_t kLeastPairDepth = 64;
constexpr int64_t kWidestLane = 16;
// Multiply-adds below which a second thread costs more than it saves.
constexpr double kSerialWork = 1 << 19;
// Long sums are cut into pieces of at least this many terms.
constexpr int64_t kLongPiece = 2048;
constexpr int64_t kMostPieces = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// From one row to the next, so that rows do not lie in the same sets of the caches: an odd number
// of lines, of float32.
int64_t apart(int64_t cols) { return round_up(cols, 32) + 16; }

// Whether k rows of b span that much.
template <class T>
bool spans(int64_t bytes, int64_t k, const Matrix<T>& b) {
  return k * b.row * static_cast<int64_t>(sizeof(T)) >= bytes;
}

// AMX multiplies through brgemm. AVX512-BF16 alone does so in tiles of our own: they need no
// kernel per shape, no call per panel, and no sums in memory unless the depth is cut.
bool has_pair_tiles() {
#if MYLAYERS_BRGEMM
  static const bool chosen = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
    return kernels().bf16_pairs.block != nullptr && !amx;
  }();
  return chosen;
#else
  return false;
#endif
}

// What multiplies T, if the processor's 16-bit matrix units do.
template <class T>
bool uses_pair_tiles() {
  return std::is_same_v<T, bfloat16_t> && has_bf16_units() && has_pair_tiles();
}
template <class T>
bool uses_brgemm() {
  return std::is_same_v<T, bfloat16_t> && has_bf16_units() && !has_pair_tiles();
}

#if MYLAYERS_BRGEMM
// a @ b for one panel of b's pairs, in calls that brgemm has kernels for.
void unit_block(
    int64_t m, int64_t cols, int64_t depth, const bfloat16_t* a, int64_t a_row, const bfloat16_t* b,
    float* sums, bool accumulate) {
  for (int64_t i = 0; i < m;) {
    int64_t rows = kUnitRows;
    while (rows > m - i) {
      rows /= 2;
    }
    at::native::cpublas::brgemm(
        rows, round_up(cols, kWidestLane), depth, a_row, kPanel, kPanel, accumulate,
        reinterpret_cast<const at::BFloat16*>(a + i * a_row),
        reinterpret_cast<const at::BFloat16*>(b), sums + i * kPanel);
    i += rows;
  }
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

// As gemm_serial, on the 16-bit matrix units. Brgemm sums in an order that depends on the depth of
// its call alone, and that is cut at fixed places; our own tiles have one order however it is cut.
// So here too a row's bits are its own.
template <class Out>
void gemm_serial_bf16(
    int64_t m, int64_t n, int64_t k, Matrix<bfloat16_t> a, Matrix<bfloat16_t> b, Source source,
    const bfloat16_t* bias, Activation act, Out* c, int64_t c_row) {
  const auto& pairs = kernels().bf16_pairs;
  const bool own = has_pair_tiles();
  if (own && m <= kManyPairRows && b.col == 1 && n > kPanel) {
    return stream_bf16(m, n, k, a, b, source, bias, act, c, c_row);
  }
  const int64_t panels = ceil_div(n, kPanel);
  const int64_t block =
      own ? std::max(kLeastPairDepth, kPackedPairs / (panels * kPanel) / 2 * 2) : kUnitDepth;
  const int64_t widest = std::min(round_up(k, 2), block);
  // Four lines more than a panel has: the next one would lie in the same sets of the caches.
  const int64_t panel_size = widest * kPanel + 2 * kPanel;
  const bool copy_a = a.col != 1 || k % 2 != 0;
  const bool rounds_in_tile = own && std::is_same_v<Out, bfloat16_t> && fits_in_tile(act);
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
      if (!own) {
        unit_block(m, cols, even_depth, a_in.data, a_in.row, panel, panel_sums, p > 0);
        continue;
      }
      bfloat16_t* out = nullptr;
      if constexpr (std::is_same_v<Out, bfloat16_t>) {
        out = rounds_in_tile && p + depth == k ? c + j * kPanel : nullptr;
      }
      pairs.block(
          m, cols, even_depth / 2, a_in.data, a_in.row, j == 0, panel, panel_sums, p > 0,
          bias ? bias + j * kPanel : nullptr, act, out, c_row);
    }
  }
  if (!own) {
    at::native::cpublas::brgemm_release();  // AMX's tiles, which oneDNN's own products set up anew
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
#endif

// Where b (k, n), of which a task reads a part, is likely to be. Networks of eight layers of 1024 x
// 1024 took 1.25 to 2.5 times as long at 1 to 32 rows while the size of one layer decided, of four
// layers 1.1 to 2.2 times; two layers stay in the cache. A weight (out, in) is asked for line by
// line: eight layers of 1000 x 1000 gain 1.04 to 1.57, four, which a cache of 32 MiB holds, took
// 1.04 to 1.14 times as long, and on a Zen 4 networks whose rows collide up to 1.27 times.
template <class T>
Source source_of(int64_t k, int64_t n, const Matrix<T>& b, int64_t in_turn) {
  const Source memory = kernels().tuning.memory;
  if (b.col == 1) {
    return in_turn >= kFarBytes || spans(kFarBytes, k, b) ? memory : Source::kCache;
  }
  const bool collide = b.col * static_cast<int64_t>(sizeof(T)) % kCollision == 0;
  const bool far = in_turn >= 2 * kFarBytes || spans(kFarBytes, n, b.transposed());
  const bool asks = memory != Source::kMemoryByLevel2 || !collide;
  return far && asks ? memory : Source::kCache;
}

// Whether m rows stream b, with stream_many.
template <class T>
bool streams_many(int64_t m, int64_t k, const Matrix<T>& b, Source source) {
  const Tuning& rows = kernels().tuning;
  constexpr bool kNarrow = !std::is_same_v<T, acc_t<T>>;
  const int64_t most = source != Source::kCache  ? rows.far
                       : kNarrow                 ? rows.narrow
                       : spans(kNearBytes, k, b) ? rows.near
                                                 : 0;
  return m > kStreamRows && m <= most && b.col == 1;
}

// Whether tiles of m rows copy what they share of b.
template <class T>
bool copies_b(int64_t m, int64_t k, const Matrix<T>& b) {
  const Tuning& rows = kernels().tuning;
  return rows.copying && b.col == 1 && spans(m < rows.copying ? kNearBytes : kLevel1Bytes, k, b);
}

// Whether tiles of n columns copy what they share of a.
template <class T>
bool copies_a(int64_t m, int64_t n, int64_t k, const Matrix<T>& a) {
  const bool apart =
      a.col == 1 ? a.row * sizeof(T) % kCollision == 0 : spans(kLevel1Bytes, k, a.transposed());
  return kernels().tuning.copying && m > kernels().product<acc_t<T>>().rows &&
         n >= kCopyingColumns && apart;
}

// Rows and columns of one task of gemm, at most; their numbers change no bit.
template <class T>
int64_t row_block() {
  return uses_pair_tiles<T>() ? kPairRowBlock : kRowBlock;
}

template <class T>
int64_t column_block(int64_t m, int64_t k, const Matrix<T>& b, Source source) {
  const bool streams = m <= kStreamRows && k > kStreamDepth && b.col == 1;
  return uses_brgemm<T>()       ? kUnitColumns
         : streams              ? kStreamSums / m
         : uses_pair_tiles<T>() ? std::clamp(kSums / m, kColumnBlock, kMostPairColumns)
         : streams_many(m, k, b, source)
             ? std::clamp(kSums / m, kColumnBlock, kernels().tuning.columns)
             : kColumnBlock;
}

// act(a (m, k) @ b (k, n) + bias) into c, on this thread. Out is T, or acc_t<T> for partial sums
// (then bias must be null).
template <class T, class Out>
void gemm_serial(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, Source source, const T* bias,
    Activation act, Out* c, int64_t c_row) {
  using C = acc_t<T>;
#if MYLAYERS_BRGEMM
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    if (k > 0 && has_bf16_units()) {
      return gemm_serial_bf16(m, n, k, a, b, source, bias, act, c, c_row);
    }
  }
#endif
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
  const bool copy_a = kWiden || many;
  const bool tiles = !streams && !many;
  const bool pack_b = tiles && (kWiden || b.col != 1);
  const bool keep_a = tiles && !kWiden && copies_a(m, n, k, a);
  const bool keep_b = tiles && !kWiden && copies_b(m, k, b);
  const bool in_scratch = kNarrow || many;

  // Passes of equal depth: a short last one would load and store every sum for little.
  const int64_t deepest = keep_b || (m <= kShallowRows && !many) ? 2 * kDepthBlock : kDepthBlock;
  const int64_t passes = std::max<int64_t>(1, (k + deepest / 2) / deepest);
  const int64_t widest = ceil_div(k, passes);

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

template <class T>
void gemm(
    int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const T* bias, Activation act, T* c,
    int64_t in_turn) {
  if (m == 0 || n == 0) {
    return;
  }
  const Source source = source_of(k, n, b, in_turn);
  const int64_t tile = kernels().product<acc_t<T>>().rows;
  const double work = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  const bool alone = work <= kSerialWork || at::in_parallel_region();
  const int64_t threads = alone ? 1 : at::get_num_threads();
  // As many tasks as keep every thread busy to the end. Columns are split before rows, because
  // tasks that share columns of b each pack them. Bits do not depend on this choice.
  int64_t row_blocks = ceil_div(m, row_block<T>());
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
  if (std::is_same_v<T, acc_t<T>> && k <= kStreamDepth && m >= threads * tile) {
    col_blocks = 1;
    row_blocks = round_up(ceil_div(m, kRowBlock), threads);
  }
  // Whole tiles, or calls of brgemm for 16 rows and more; equal tasks come first, so that columns
  // are cut in whole vectors: of 257 in whole panels one thread had 192.
  const int64_t whole = uses_brgemm<T>() ? 16 : tile;
  const int64_t multiple = m / row_blocks >= whole ? whole : 1;
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
  // A result this large keeps the threads busy without cutting its sums.
  constexpr int64_t kLargeResult = 256 * 256;
  const int64_t piece = std::max(kLongPiece, round_up(ceil_div(k, kMostPieces), kDepthBlock));
  const int64_t pieces = ceil_div(k, piece);
  if (pieces < 2 || m * n > kLargeResult) {
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
