// Activation and its derivative on CUDA, each in one pass with the bias's part of it.
#include "activation.cuh"
#include "device.cuh"

namespace mylayers::cuda {
namespace {

// Of z rounded to T, where that is what backward reads (csrc/activation.h).
template <ActivationKind kAct, class T, class C>
__device__ __forceinline__ C activated_as_kept(C z) {
  return activated<kAct>(reads_input(kAct) ? static_cast<C>(static_cast<T>(z)) : z);
}

// y = act(z + bias). A thread keeps its columns' bias and walks down the rows. z may be y: each
// element is read before it is written, by the same thread.
template <class T, class Z, int N, ActivationKind kAct>
__global__ void __launch_bounds__(kTileThreads)
    bias_act_kernel(Tiles t, const Z* z, const T* bias, T* y) {
  using C = acc_t<T>;
  for (int64_t task = blockIdx.x; task < t.blocks(); task += gridDim.x) {
    const Place p(t, task);
    if (!p.inside) {
      continue;
    }
    C b[N] = {};
    if (bias) {
      const auto values = load<N>(bias + p.column * N);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        b[n] = static_cast<C>(values.at[n]);
      }
    }
    for (int64_t i = p.first_row; i < p.end_row; i += t.height) {
      const int64_t at = (i * t.cols + p.column) * N;
      Vec<T, N> out;
      if constexpr (sizeof(Z) == sizeof(T)) {
        const auto in = load<N>(z + at);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const C v = static_cast<C>(in.at[n]);
          out.at[n] = static_cast<T>(activated_as_kept<kAct, T>(bias ? v + b[n] : v));
        }
      } else {  // N values of Z take two vectors or more
        constexpr int kPart = N < kLanes<Z> ? N : kLanes<Z>;
#pragma unroll
        for (int part = 0; part < N; part += kPart) {
          const auto in = load<kPart>(z + at + part);
#pragma unroll
          for (int n = 0; n < kPart; ++n) {
            const C v = static_cast<C>(in.at[n]);
            out.at[part + n] =
                static_cast<T>(activated_as_kept<kAct, T>(bias ? v + b[part + n] : v));
          }
        }
      }
      store(y + at, out);
    }
  }
}

// dz = dy * act'(y); per chunk of rows the column sums of dz, to db where there is one chunk and
// to partial (chunks, columns) otherwise. A thread adds its rows from top to bottom, sum_rows adds
// the block's threads, sum_chunks_kernel the chunks.
template <class T, int N, ActivationKind kAct>
__global__ void __launch_bounds__(kTileThreads) mask_and_sum_kernel(
    Tiles t, const T* __restrict__ dy, int64_t dy_row, const T* __restrict__ y, T* __restrict__ dz,
    T* __restrict__ db, acc_t<T>* __restrict__ partial) {
  using C = acc_t<T>;
  for (int64_t task = blockIdx.x; task < t.blocks(); task += gridDim.x) {
    const Place p(t, task);
    C sums[N] = {};
    if (p.inside) {
#pragma unroll 4
      for (int64_t i = p.first_row; i < p.end_row; i += t.height) {
        auto g = load<N>(dy + i * dy_row + p.column * N);
        if constexpr (kAct != Activation::kNone) {
          const auto out = load<N>(y + (i * t.cols + p.column) * N);
#pragma unroll
          for (int n = 0; n < N; ++n) {
            g.at[n] = static_cast<T>(
                activation_gradient<kAct>(static_cast<C>(g.at[n]), static_cast<C>(out.at[n])));
          }
        }
        if (dz) {
          store(dz + (i * t.cols + p.column) * N, g);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
          sums[n] += static_cast<C>(g.at[n]);  // what the weight's gradient reads
        }
      }
    }
    if (db) {  // the same for all threads
      sum_rows(sums, t);
      if (p.inside && p.row == 0) {
        if (t.chunks == 1) {
          Vec<T, N> total;
#pragma unroll
          for (int n = 0; n < N; ++n) {
            total.at[n] = static_cast<T>(sums[n]);
          }
          store(db + p.column * N, total);
        } else {
#pragma unroll
          for (int n = 0; n < N; ++n) {
            partial[(p.chunk * t.cols + p.column) * N + n] = sums[n];
          }
        }
      }
    }
  }
}

// db = partial (chunks, columns), summed over the chunks: a block for each strip of columns.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    sum_chunks_kernel(Tiles t, const acc_t<T>* __restrict__ partial, T* __restrict__ db) {
  for (int64_t task = blockIdx.x; task < t.strips; task += gridDim.x) {
    const Place p(t, task);
    acc_t<T> sums[1] = {};
    if (p.inside) {
#pragma unroll 4
      for (int64_t i = p.row; i < t.rows; i += t.height) {
        sums[0] += partial[i * t.cols + p.column];
      }
    }
    sum_rows(sums, t);
    if (p.inside && p.row == 0) {
      db[p.column] = static_cast<T>(sums[0]);
    }
  }
}

// f(std::integral_constant<int, N>{}): whole vectors where memory allows, single values else.
template <class T, class F>
void with_lanes(bool aligned, const F& f) {
  if (aligned) {
    f(std::integral_constant<int, kLanes<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

template <class T>
bool divides(int64_t cols) {
  return cols % kLanes<T> == 0;
}

}  // namespace

template <class T, class Z>
void bias_act(
    int64_t rows, int64_t cols, const Z* z, const T* bias, Activation act, T* y,
    cudaStream_t stream) {
  if (rows == 0 || cols == 0) {
    return;
  }
  const bool aligned = divides<T>(cols) && is_aligned(z) && is_aligned(bias) && is_aligned(y);
  with_lanes<T>(aligned, [&](auto lanes) {
    constexpr int kN = decltype(lanes)::value;
    const Tiles t(rows, cols / kN);
    with_activation(act, [&](auto constant) {
      launch(
          {grid_for(t.blocks()), kTileThreads, stream},
          bias_act_kernel<T, Z, kN, decltype(constant)::value>, t, z, bias, y);
    });
  });
}

template <class T>
void mask_and_sum(
    int64_t rows, int64_t cols, const T* dy, int64_t dy_row, const T* y, Activation act, T* dz,
    T* db, acc_t<T>* partial, cudaStream_t stream) {
  if (cols == 0) {
    return;
  }
  const bool aligned = divides<T>(cols) && divides<T>(dy_row) && is_aligned(dy) && is_aligned(y) &&
                       is_aligned(dz) && is_aligned(db);
  with_lanes<T>(aligned, [&](auto lanes) {
    constexpr int kN = decltype(lanes)::value;
    const Tiles t(rows, cols / kN);
    with_activation(act, [&](auto constant) {
      launch(
          {grid_for(t.blocks()), kTileThreads, stream},
          mask_and_sum_kernel<T, kN, decltype(constant)::value>, t, dy, dy_row, y, dz, db, partial);
    });
    if (db && t.chunks > 1) {
      const Tiles sums(t.chunks, cols);
      launch(
          {grid_for(sums.strips), kTileThreads, stream}, sum_chunks_kernel<T>, sums, partial, db);
    }
  });
}

template <class T>
int64_t mask_and_sum_partials(int64_t rows, int64_t cols) {
  if (cols == 0) {
    return 0;
  }
  const int64_t vectors = divides<T>(cols) ? Tiles(rows, cols / kLanes<T>).chunks : 0;
  return std::max(vectors, Tiles(rows, cols).chunks) * cols;
}

#define INSTANTIATE(T)                                                                             \
  template void bias_act<T, T>(                                                                    \
      int64_t, int64_t, const T*, const T*, Activation, T*, cudaStream_t);                         \
  template void mask_and_sum<T>(                                                                   \
      int64_t, int64_t, const T*, int64_t, const T*, Activation, T*, T*, acc_t<T>*, cudaStream_t); \
  template int64_t mask_and_sum_partials<T>(int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::Half)
INSTANTIATE(c10::BFloat16)
#undef INSTANTIATE
template void bias_act<c10::Half, float>(
    int64_t, int64_t, const float*, const c10::Half*, Activation, c10::Half*, cudaStream_t);
template void bias_act<c10::BFloat16, float>(
    int64_t, int64_t, const float*, const c10::BFloat16*, Activation, c10::BFloat16*, cudaStream_t);

}  // namespace mylayers::cuda
