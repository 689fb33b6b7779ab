// What the kernels of this folder share: launches, vectors of 16 bytes, sums in a fixed order,
// tiles of a matrix.
//
// No sum here uses atomic additions: its order depends on the sizes alone (in center's grid kernel
// on the number of multiprocessors too), so that a call gives the same bits each time.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace mylayers::cuda {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- launches ------------------------------------------------------------------------

// A grid of as many blocks as there are tasks, or as the grid may have: kernels take the tasks
// beyond it in further turns.
inline unsigned grid_for(int64_t tasks) {
  return static_cast<unsigned>(std::min<int64_t>(tasks, std::numeric_limits<int>::max()));
}

struct Launch {
  unsigned blocks, threads;
  cudaStream_t stream;
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks at once, so that they can wait for each other
};

template <class... Parameters, class... Arguments>
cudaError_t try_launch(
    const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.blocks);
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = &attribute;
  config.numAttrs = how.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  C10_CUDA_CHECK(try_launch(how, kernel, arguments...));
}

// ---- vectors -------------------------------------------------------------------------

// Values of T in one access of 16 bytes.
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

// N values; N is kLanes<T>, or 1 where memory is not aligned for that.
template <class T, int N>
struct Vec {
  T at[N];
};

template <size_t kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = unsigned long long;
};
template <>
struct Word<16> {
  using type = uint4;
};
template <class T, int N>
using word_t = typename Word<N * sizeof(T)>::type;

template <class T, int N>
__device__ __forceinline__ word_t<T, N> packed(const Vec<T, N>& v) {
  word_t<T, N> word;
  memcpy(&word, &v, sizeof(v));
  return word;
}

template <class T, int N>
__device__ __forceinline__ Vec<T, N> unpacked(const word_t<T, N>& word) {
  Vec<T, N> v;
  memcpy(&v, &word, sizeof(v));
  return v;
}

// What is not wanted again soon need not push out of the cache what is.
enum class Cache { kKeep, kStream };

template <int N, Cache kCache = Cache::kKeep, class T>
__device__ __forceinline__ Vec<T, N> load(const T* from) {
  const auto* p = reinterpret_cast<const word_t<T, N>*>(from);
  if constexpr (kCache == Cache::kStream) {
    return unpacked<T, N>(__ldcs(p));
  } else {
    return unpacked<T, N>(*p);
  }
}

template <Cache kCache = Cache::kKeep, class T, int N>
__device__ __forceinline__ void store(T* to, const Vec<T, N>& v) {
  auto* p = reinterpret_cast<word_t<T, N>*>(to);
  if constexpr (kCache == Cache::kStream) {
    __stcs(p, packed(v));
  } else {
    *p = packed(v);
  }
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

// ---- sums in a fixed order -----------------------------------------------------------

// Over a warp, to every lane of it the same bits: each step adds the same two numbers in both
// lanes of a pair.
__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    v += __shfl_xor_sync(0xffffffffu, v, lane);
  }
  return v;
}

// Over a group of threads, a warp or the whole block, to each of them.
template <int kGroup>
__device__ __forceinline__ double group_sum(double v) {
  v = warp_sum(v);
  if constexpr (kGroup > kWarp) {
    __shared__ double of_warp[kGroup / kWarp];
    __syncthreads();  // those of a former call have been read
    if (threadIdx.x % kWarp == 0) {
      of_warp[threadIdx.x / kWarp] = v;
    }
    __syncthreads();
    v = of_warp[0];
#pragma unroll
    for (int w = 1; w < kGroup / kWarp; ++w) {
      v += of_warp[w];
    }
  }
  return v;
}

// ---- tiles of a matrix ---------------------------------------------------------------

constexpr int kTileThreads = 256;

// (rows, cols), cols in vectors: a block of threads stands on `width` columns and `height` rows,
// and walks down its chunk of rows. Where sums are cut depends on the sizes alone.
struct Tiles {
  int64_t rows, cols;
  int width, height;
  int64_t strips, chunks, chunk_rows;

  Tiles(int64_t rows, int64_t cols) : rows(rows), cols(cols) {
    width = static_cast<int>(std::min<int64_t>(cols, kWarp));
    height = kTileThreads / width;
    strips = ceil_div(cols, width);
    // A block is not worth less than 16 rows a thread; 2048 blocks fill any GPU.
    const int64_t wanted = std::max<int64_t>(1, 2048 / strips);
    chunk_rows = std::max<int64_t>(16 * height, ceil_div(rows, wanted));
    chunks = std::max<int64_t>(1, ceil_div(rows, chunk_rows));  // no rows: their sums are 0
  }

  __host__ __device__ int64_t blocks() const { return strips * chunks; }
};

// Where a thread stands in the tile of a task, counted over strips first.
struct Place {
  int64_t chunk, column, first_row, end_row;
  int row;      // in the block
  bool inside;  // threads beside the tile have no work

  __device__ Place(const Tiles& t, int64_t task) {
    chunk = task / t.strips;
    column = task % t.strips * t.width + threadIdx.x % t.width;
    row = static_cast<int>(threadIdx.x) / t.width;
    inside = row < t.height && column < t.cols;
    const int64_t begin = chunk * t.chunk_rows, end = begin + t.chunk_rows;
    first_row = begin + row;
    end_row = end < t.rows ? end : t.rows;
  }
};

// Adds s over the rows of the block, by halves; every thread gets its column's sum. All threads
// of the block must call it.
template <class C, int N>
__device__ __forceinline__ void sum_rows(C (&s)[N], const Tiles& t) {
  __shared__ C all[kTileThreads * N];
  const int row = static_cast<int>(threadIdx.x) / t.width, column = threadIdx.x % t.width;
  __syncthreads();  // those of a former call have been read
#pragma unroll
  for (int n = 0; n < N; ++n) {
    all[threadIdx.x * N + n] = s[n];
  }
  for (int rows = t.height; rows > 1;) {
    const int upper = (rows + 1) / 2;
    __syncthreads();
    if (row < rows - upper) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        all[threadIdx.x * N + n] += all[(threadIdx.x + upper * t.width) * N + n];
      }
    }
    rows = upper;
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    s[n] = all[column * N + n];
  }
}

}  // namespace mylayers::cuda
