// x - mean(x). Runs of contiguous values (inner = 1) or columns (inner > 1).
//
// Values of a vector are added in acc_t as a tree and their sum is widened to float64, in which
// all further sums are formed, in an order that the sizes and the device fix. The mean is rounded
// to T before it is subtracted: that is what x - x.mean() says. x is read once where a thread, a
// block or the whole grid can keep it between the two phases; where it cannot, the second phase
// goes downwards, because it meets in cache what the first has read last.
#include <c10/cuda/CUDACachingAllocator.h>
#include <cooperative_groups.h>

#include "device.cuh"

namespace mylayers::cuda {
namespace {

constexpr int kBlock = 512;        // threads of a block that has one slice, or a part of it
constexpr int kTile = 8;           // vectors that a thread keeps between the phases
constexpr int kGridTile = 16;      // and in a cooperative grid, of one block a multiprocessor
constexpr int kStreamBlock = 256;  // threads of a block that keeps nothing

// Bytes of a slice that one warp, or one block, is left alone with.
constexpr int64_t kWarpBytes = 2 << 10, kBlockBytes = 64 << 10;
// Values of a slice up to which one thread is.
constexpr int64_t kThreadValues = 16;
// Columns from which a thread each fills the GPU.
constexpr int64_t kManyColumns = 1 << 15;
// Sums of a slice's chunks that every block of the second phase adds by itself.
constexpr int64_t kFewSums = 1024;

template <class T, int N>
__device__ __forceinline__ double sum(const Vec<T, N>& v) {
  acc_t<T> s[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    s[n] = static_cast<acc_t<T>>(v.at[n]);
  }
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
    for (int n = 0; n < half; ++n) {
      s[n] += s[n + half];
    }
  }
  return s[0];
}

template <class T>
__device__ __forceinline__ T rounded_mean(double sum, double count) {
  return static_cast<T>(static_cast<acc_t<T>>(sum / count));
}

template <class T>
__device__ __forceinline__ T difference(T x, T mean) {
  return static_cast<T>(static_cast<acc_t<T>>(x) - static_cast<acc_t<T>>(mean));
}

template <class T, int N>
__device__ __forceinline__ Vec<T, N> difference(Vec<T, N> v, T mean) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    v.at[n] = difference(v.at[n], mean);
  }
  return v;
}

// n contiguous values as vectors, and the single values before and after these: fewer than 2 N.
// x and out lie alike modulo a vector's size.
template <class T, int N>
struct Run {
  const T* x;
  T* out;
  int64_t head, vectors, edges;

  __device__ Run(const T* x, T* out, int64_t n) : x(x), out(out) {
    const int64_t before =
        (kVectorBytes - reinterpret_cast<uintptr_t>(x) % kVectorBytes) % kVectorBytes / sizeof(T);
    head = N == 1 ? 0 : before < n ? before : n;
    vectors = (n - head) / N;
    edges = n - vectors * N;
  }

  __device__ int64_t edge(int64_t e) const { return e < head ? e : vectors * N + e; }

  template <Cache kCache = Cache::kKeep>
  __device__ Vec<T, N> vector(int64_t i) const {
    return load<N, kCache>(x + head + i * N);
  }
  template <Cache kCache = Cache::kKeep>
  __device__ void write(int64_t i, const Vec<T, N>& v, T mean) const {
    store<kCache>(out + head + i * N, difference(v, mean));
  }
  __device__ void write_edge(int64_t e, T mean) const {
    out[edge(e)] = difference(x[edge(e)], mean);
  }
};

// ---- a slice to a group of threads ---------------------------------------------------

// Each slice of `count` values by a warp (kGroup = 32) or a block, which keeps the first
// kTile * kGroup vectors in registers.
template <class T, int N, int kGroup>
__global__ void __launch_bounds__(kGroup > kWarp ? kGroup : 4 * kWarp)
    slices_kernel(int64_t slices, int64_t count, const T* __restrict__ x, T* __restrict__ out) {
  const int64_t groups = blockDim.x / kGroup, lane = threadIdx.x % kGroup;
  for (int64_t s = blockIdx.x * groups + threadIdx.x / kGroup; s < slices;
       s += gridDim.x * groups) {
    const Run<T, N> run(x + s * count, out + s * count, count);
    Vec<T, N> tile[kTile];
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      const int64_t i = lane + k * kGroup;
      tile[k] = i < run.vectors ? run.vector(i) : Vec<T, N>{};
    }
    double total = lane < run.edges ? static_cast<double>(run.x[run.edge(lane)]) : 0;
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      total += sum(tile[k]);
    }
#pragma unroll 4
    for (int64_t i = lane + kTile * kGroup; i < run.vectors; i += kGroup) {
      total += sum(run.vector(i));
    }
    const T mean = rounded_mean<T>(group_sum<kGroup>(total), static_cast<double>(count));
    const int64_t turns = ceil_div(run.vectors, kGroup);
#pragma unroll 4
    for (int64_t k = turns - 1; k >= kTile; --k) {
      const int64_t i = lane + k * kGroup;
      if (i < run.vectors) {
        run.write(i, run.vector(i), mean);
      }
    }
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      const int64_t i = lane + k * kGroup;
      if (i < run.vectors) {
        run.write(i, tile[k], mean);
      }
    }
    if (lane < run.edges) {
      run.write_edge(lane, mean);
    }
  }
}

// ---- all of x to the whole grid ------------------------------------------------------

// One launch: the vectors are dealt out to all blocks, which keep them in registers and, beyond
// kGridTile a thread, in shared memory while they wait for each other's sums. `turns` vectors
// a thread cover x. `sums` has an element for each block.
template <class T, int N>
__global__ void __launch_bounds__(kBlock, 1)
    grid_kernel(int64_t n, int turns, const T* __restrict__ x, T* __restrict__ out, double* sums) {
  extern __shared__ uint4 dynamic[];
  T* kept = reinterpret_cast<T*>(dynamic) + threadIdx.x * N;  // read again by this thread alone
  const Run<T, N> run(x, out, n);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  const bool has_edge = first < run.edges;

  // Packed: as values of 16 bits each would take a register of its own.
  word_t<T, N> tile[kGridTile];
#pragma unroll
  for (int k = 0; k < kGridTile; ++k) {
    const int64_t i = first + k * step;
    tile[k] = i < run.vectors ? packed(run.vector(i)) : word_t<T, N>{};
  }
  double total = has_edge ? static_cast<double>(x[run.edge(first)]) : 0;
#pragma unroll
  for (int k = 0; k < kGridTile; ++k) {
    total += sum(unpacked<T, N>(tile[k]));
  }
#pragma unroll 2
  for (int k = kGridTile; k < turns; ++k) {
    const int64_t i = first + k * step;
    if (i < run.vectors) {
      const auto v = run.vector(i);
      store(kept + (k - kGridTile) * kBlock * N, v);
      total += sum(v);
    }
  }

  total = group_sum<kBlock>(total);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = total;
  }
  cooperative_groups::this_grid().sync();
  total = 0;
  for (int64_t b = threadIdx.x; b < gridDim.x; b += kBlock) {
    total += __ldcg(sums + b);
  }
  const T mean = rounded_mean<T>(group_sum<kBlock>(total), static_cast<double>(n));

#pragma unroll
  for (int k = 0; k < kGridTile; ++k) {
    const int64_t i = first + k * step;
    if (i < run.vectors) {
      run.write(i, unpacked<T, N>(tile[k]), mean);
    }
  }
#pragma unroll 2
  for (int k = kGridTile; k < turns; ++k) {
    const int64_t i = first + k * step;
    if (i < run.vectors) {
      run.write(i, load<N>(kept + (k - kGridTile) * kBlock * N), mean);
    }
  }
  if (has_edge) {
    run.write_edge(first, mean);
  }
}

// ---- runs in two phases --------------------------------------------------------------

// (lead, outer) runs of `count` values, each cut into `chunks` pieces of `length` values.
struct RunPieces {
  int64_t lead, outer, count, length, chunks;

  __host__ __device__ int64_t pieces() const { return lead * outer * chunks; }

  template <class T, int N>
  __device__ Run<T, N> run(int64_t piece, const T* x, T* out) const {
    const int64_t start = piece % chunks * length, at = piece / chunks * count + start;
    return Run<T, N>(x + at, out + at, count - start < length ? count - start : length);
  }
};

// Sums of a slice: those at [(l * outer + slice) * chunks + c], in the order of (l, c).
struct Sums {
  const double* values;
  int64_t lead, outer, chunks;

  template <int kGroup>
  __device__ double of(int64_t slice, int lane) const {
    double total = 0;
    for (int64_t i = lane; i < lead * chunks; i += kGroup) {
      total += values[(i / chunks * outer + slice) * chunks + i % chunks];
    }
    return group_sum<kGroup>(total);
  }
};

template <class T, int N, int kGroup>
__global__ void __launch_bounds__(kStreamBlock)
    run_sums_kernel(RunPieces p, const T* __restrict__ x, double* __restrict__ sums) {
  const int64_t groups = kStreamBlock / kGroup, lane = threadIdx.x % kGroup;
  for (int64_t piece = blockIdx.x * groups + threadIdx.x / kGroup; piece < p.pieces();
       piece += gridDim.x * groups) {
    const auto run = p.run<T, N>(piece, x, nullptr);
    double total = lane < run.edges ? static_cast<double>(run.x[run.edge(lane)]) : 0;
#pragma unroll 8
    for (int64_t i = lane; i < run.vectors; i += kGroup) {
      total += sum(run.vector(i));
    }
    total = group_sum<kGroup>(total);
    if (lane == 0) {
      sums[piece] = total;
    }
  }
}

// One sum a slice, where these are too many to be added again by every block.
__global__ void __launch_bounds__(kStreamBlock)
    slice_sums_kernel(Sums sums, int64_t slices, double* __restrict__ totals) {
  for (int64_t s = blockIdx.x; s < slices; s += gridDim.x) {
    const double total = sums.of<kStreamBlock>(s, threadIdx.x);
    if (threadIdx.x == 0) {
      totals[s] = total;
    }
  }
}

template <class T, int N, int kGroup>
__global__ void __launch_bounds__(kStreamBlock)
    run_subtract_kernel(RunPieces p, Sums sums, const T* __restrict__ x, T* __restrict__ out) {
  const int64_t groups = kStreamBlock / kGroup, lane = threadIdx.x % kGroup;
  for (int64_t task = blockIdx.x * groups + threadIdx.x / kGroup; task < p.pieces();
       task += gridDim.x * groups) {
    const int64_t piece = p.pieces() - 1 - task;
    const auto run = p.run<T, N>(piece, x, out);
    const T mean = rounded_mean<T>(
        sums.of<kGroup>(piece / p.chunks % p.outer, lane),
        static_cast<double>(p.lead) * static_cast<double>(p.count));
    if (lane < run.edges) {
      run.write_edge(lane, mean);
    }
#pragma unroll 4
    for (int64_t k = ceil_div(run.vectors, kGroup) - 1; k >= 0; --k) {
      const int64_t i = lane + k * kGroup;
      if (i < run.vectors) {
        run.template write<Cache::kStream>(i, run.template vector<Cache::kStream>(i), mean);
      }
    }
  }
}

// ---- columns -------------------------------------------------------------------------

// Adds to sums the columns of rows first, first + step, ... below end of x, whose rows are `row`
// values apart. Four rows are added in acc_t, as a tree, before they are widened.
template <class T, int N>
__device__ __forceinline__ void add_rows(
    const T* x, int64_t row, int64_t first, int64_t end, int64_t step, double (&sums)[N]) {
  using C = acc_t<T>;
  int64_t i = first;
  for (; i + 3 * step < end; i += 4 * step) {
    Vec<T, N> v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      v[k] = load<N>(x + (i + k * step) * row);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sums[n] += (static_cast<C>(v[0].at[n]) + static_cast<C>(v[1].at[n])) +
                 (static_cast<C>(v[2].at[n]) + static_cast<C>(v[3].at[n]));
    }
  }
  for (; i < end; i += step) {
    const auto v = load<N>(x + i * row);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sums[n] += static_cast<C>(v.at[n]);
    }
  }
}

// The same rows, downwards: out = x - mean.
template <class T, int N>
__device__ __forceinline__ void subtract_rows(
    const T* x, T* out, int64_t row, int64_t first, int64_t end, int64_t step,
    const double (&sums)[N], int64_t count) {
  if (first >= end) {
    return;
  }
  T means[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    means[n] = rounded_mean<T>(sums[n], static_cast<double>(count));
  }
#pragma unroll 4
  for (int64_t i = first + (end - 1 - first) / step * step; i >= first; i -= step) {
    auto v = load<N>(x + i * row);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      v.at[n] = difference(v.at[n], means[n]);
    }
    store(out + i * row, v);
  }
}

// A column, or N of them, to a thread.
template <class T, int N>
__global__ void __launch_bounds__(kStreamBlock) columns_kernel(
    int64_t outer, int64_t count, int64_t inner, const T* __restrict__ x, T* __restrict__ out) {
  const int64_t vectors = inner / N;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kStreamBlock + threadIdx.x;
       c < outer * vectors; c += static_cast<int64_t>(gridDim.x) * kStreamBlock) {
    const int64_t at = c / vectors * count * inner + c % vectors * N;
    double sums[N] = {};
    add_rows<T, N>(x + at, inner, 0, count, 1, sums);
    subtract_rows<T, N>(x + at, out + at, inner, 0, count, 1, sums, count);
  }
}

// sums (outer, chunks, inner): of each column over each chunk of rows.
template <class T, int N>
__global__ void __launch_bounds__(kTileThreads)
    column_sums_kernel(Tiles t, int64_t outer, const T* __restrict__ x, double* __restrict__ sums) {
  for (int64_t task = blockIdx.x; task < outer * t.blocks(); task += gridDim.x) {
    const int64_t o = task / t.blocks();
    const Place p(t, task % t.blocks());
    double own[N] = {};
    if (p.inside) {
      add_rows<T, N>(
          x + (o * t.rows * t.cols + p.column) * N, t.cols * N, p.first_row, p.end_row, t.height,
          own);
    }
    sum_rows(own, t);
    if (p.inside && p.row == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        sums[((o * t.chunks + p.chunk) * t.cols + p.column) * N + n] = own[n];
      }
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kTileThreads) column_subtract_kernel(
    Tiles t, int64_t outer, const double* __restrict__ sums, const T* __restrict__ x,
    T* __restrict__ out) {
  for (int64_t task = blockIdx.x; task < outer * t.blocks(); task += gridDim.x) {
    const int64_t downwards = outer * t.blocks() - 1 - task, o = downwards / t.blocks();
    const Place p(t, downwards % t.blocks());
    double total[N] = {};
    if (p.inside) {
      for (int64_t c = p.row; c < t.chunks; c += t.height) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          total[n] += sums[((o * t.chunks + c) * t.cols + p.column) * N + n];
        }
      }
    }
    sum_rows(total, t);
    if (p.inside) {
      const int64_t at = (o * t.rows * t.cols + p.column) * N;
      subtract_rows<T, N>(
          x + at, out + at, t.cols * N, p.first_row, p.end_row, t.height, total, t.rows);
    }
  }
}

// ---- which kernel --------------------------------------------------------------------

// Memory for one call, in the order of the stream.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : memory_(c10::cuda::CUDACachingAllocator::get()->allocate(count * sizeof(double))) {}
  double* get() const { return static_cast<double*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

template <class T, int N, int kGroup>
void center_slices(const CenterSizes& s, const T* x, T* out, cudaStream_t stream) {
  constexpr int kThreads = kGroup > kWarp ? kGroup : 4 * kWarp;
  launch(
      {grid_for(ceil_div(s.outer, kThreads / kGroup)), kThreads, stream},
      slices_kernel<T, N, kGroup>, s.outer, s.count, x, out);
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int64_t multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

// Whether the whole grid can keep x between the phases; if so, it is done. A block of grid_kernel
// fits on every multiprocessor: its launch bounds leave a thread 128 registers.
template <class T, int N>
bool center_grid(int64_t n, const T* x, T* out, cudaStream_t stream) {
  constexpr int64_t kTurnBytes = kBlock * N * sizeof(T);
  constexpr int64_t kOwnShared = 1 << 10;  // group_sum's, and what CUDA reserves
  const int64_t vectors = n / N;
  const int64_t blocks = std::min(multiprocessors(), ceil_div(vectors, kBlock));
  const int64_t turns = ceil_div(vectors, blocks * kBlock);
  const int64_t shared = std::max<int64_t>(turns - kGridTile, 0) * kTurnBytes;
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kOwnShared;
  if (!attribute(cudaDevAttrCooperativeLaunch) || shared > most) {
    return false;
  }
  const auto kernel = grid_kernel<T, N>;
  // The most in every call: what one thread asks for holds for the launches of all.
  C10_CUDA_CHECK(cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)));
  const Scratch sums(blocks);
  const cudaError_t error = try_launch(
      {static_cast<unsigned>(blocks), kBlock, stream, static_cast<size_t>(shared), true}, kernel, n,
      static_cast<int>(turns), x, out, sums.get());
  if (error == cudaErrorCooperativeLaunchTooLarge) {  // this process has a part of the GPU only
    static_cast<void>(cudaGetLastError());
    return false;
  }
  C10_CUDA_CHECK(error);
  return true;
}

template <class T, int N, int kGroup>
void center_pieces(const CenterSizes& s, const T* x, T* out, cudaStream_t stream) {
  // Whole turns of a block, and no more pieces than a block adds up by itself.
  const int64_t least = 16 * kGroup * kLanes<T>;
  const int64_t length = ceil_div(ceil_div(s.count, kFewSums), least) * least;
  const RunPieces p{s.lead, s.outer, s.count, length, ceil_div(s.count, length)};
  const auto groups = [](int64_t tasks) {
    return grid_for(ceil_div(tasks, kStreamBlock / kGroup));
  };
  const bool many = p.lead * p.chunks > kFewSums;
  const Scratch memory(p.pieces() + (many ? p.outer : 0));
  launch(
      {groups(p.pieces()), kStreamBlock, stream}, run_sums_kernel<T, N, kGroup>, p, x,
      memory.get());
  Sums sums{memory.get(), p.lead, p.outer, p.chunks};
  if (many) {
    double* totals = memory.get() + p.pieces();
    launch({grid_for(p.outer), kStreamBlock, stream}, slice_sums_kernel, sums, p.outer, totals);
    sums = {totals, 1, p.outer, 1};
  }
  launch(
      {groups(p.pieces()), kStreamBlock, stream}, run_subtract_kernel<T, N, kGroup>, p, sums, x,
      out);
}

template <class T, int N>
void center_runs(const CenterSizes& s, const T* x, T* out, cudaStream_t stream) {
  const int64_t bytes = s.count * static_cast<int64_t>(sizeof(T));
  if (s.lead == 1) {
    if (bytes <= kWarpBytes) {
      return center_slices<T, N, kWarp>(s, x, out, stream);
    }
    if (bytes <= kBlockBytes || s.outer >= 16 * multiprocessors()) {
      return center_slices<T, N, kBlock>(s, x, out, stream);
    }
    if (s.outer == 1 && center_grid<T, N>(s.count, x, out, stream)) {
      return;
    }
  }
  if (bytes <= kWarpBytes) {
    center_pieces<T, N, kWarp>(s, x, out, stream);
  } else {
    center_pieces<T, N, kStreamBlock>(s, x, out, stream);
  }
}

template <class T, int N>
void center_columns(const CenterSizes& s, const T* x, T* out, cudaStream_t stream) {
  const int64_t columns = s.outer * (s.inner / N);
  if (s.count <= kThreadValues || columns >= kManyColumns) {
    launch(
        {grid_for(ceil_div(columns, kStreamBlock)), kStreamBlock, stream}, columns_kernel<T, N>,
        s.outer, s.count, s.inner, x, out);
    return;
  }
  const Tiles t(s.count, s.inner / N);
  const auto blocks = grid_for(s.outer * t.blocks());
  const Scratch sums(s.outer * t.chunks * s.inner);
  launch({blocks, kTileThreads, stream}, column_sums_kernel<T, N>, t, s.outer, x, sums.get());
  launch(
      {blocks, kTileThreads, stream}, column_subtract_kernel<T, N>, t, s.outer, sums.get(), x, out);
}

}  // namespace

template <class T>
void subtract_mean(const CenterSizes& s, const T* x, T* out, cudaStream_t stream) {
  constexpr int N = kLanes<T>;
  if (s.inner == 1 && (s.lead > 1 || s.count > kThreadValues || s.outer == 1)) {
    const bool alike =
        (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(out)) % kVectorBytes == 0;
    (alike ? center_runs<T, N> : center_runs<T, 1>)(s, x, out, stream);
  } else {
    const bool aligned = s.inner % N == 0 && is_aligned(x) && is_aligned(out);
    (aligned ? center_columns<T, N> : center_columns<T, 1>)(s, x, out, stream);
  }
}

template void subtract_mean<float>(const CenterSizes&, const float*, float*, cudaStream_t);
template void subtract_mean<double>(const CenterSizes&, const double*, double*, cudaStream_t);
template void subtract_mean<c10::Half>(
    const CenterSizes&, const c10::Half*, c10::Half*, cudaStream_t);
template void subtract_mean<c10::BFloat16>(
    const CenterSizes&, const c10::BFloat16*, c10::BFloat16*, cudaStream_t);

}  // namespace mylayers::cuda
