// center on the CPU: x - mean(x) over all of x or over some dimensions.
//
// x is seen as (outer, count, inner), contiguous, the mean over `count`. Chunks of fixed size
// are summed (kernels.inl), their sums added in order in float64, so the threads change no bit
// of the result, nor do the other slices of x. The mean is rounded to the dtype of x before it
// is subtracted: that is what x - x.mean() says.
#include "../center.h"

#include <ATen/ops/empty_like.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "dtypes.h"
#include "scratch.h"

namespace mylayers {
namespace cpu {
namespace {

// Values of a run, and rows of a slice of columns, that make one chunk.
constexpr int64_t kRunChunk = 1 << 15;
constexpr int64_t kRowChunk = 256;
// Elements per thread below which a second thread does not pay.
constexpr int64_t kGrain = 1 << 15;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrain / elements); }

// To T and back to the type that T computes in.
template <class T>
acc_t<T> rounded(double mean) {
  using C = acc_t<T>;
  const C in = static_cast<C>(mean);
  T narrow;
  kernels().storage<T>().finish(1, 1, &in, 1, nullptr, Activation::kNone, &narrow, 1);
  C out;
  kernels().storage<T>().pack(1, 1, &narrow, 1, 1, &out, 1);
  return out;
}

// How (outer, count, inner) is cut: into chunks of `size` along count.
struct Chunks {
  int64_t outer, count, inner, size;
  int64_t per_slice = ceil_div(count, size);

  // body(chunk, slice, offset of its first element, its length along count). A second pass
  // backwards, over what the first left in the cache, lost on the development machine: 0.94
  // of the forward one's speed at 2^18 values, 0.8 at 2^22; the prefetcher starts anew at
  // every chunk.
  template <class Body>
  void each(Body body) const {
    at::parallel_for(0, outer * per_slice, grain(size * inner), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t slice = chunk / per_slice, start = chunk % per_slice * size;
        body(chunk, slice, (slice * count + start) * inner, std::min(size, count - start));
      }
    });
  }
};

// inner = 1: every slice is a contiguous run.
template <class T>
void center_runs(int64_t outer, int64_t count, const T* x, T* out) {
  const auto& storage = kernels().storage<T>();
  const auto mean = [&](double sum) { return rounded<T>(sum / static_cast<double>(count)); };
  if (count <= kRunChunk) {
    at::parallel_for(0, outer, grain(count), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * count; at < end * count; at += count) {
        storage.subtract(count, x + at, mean(storage.sum(count, x + at)), out + at);
      }
    });
    return;
  }
  const Chunks chunks{outer, count, 1, kRunChunk};
  const Scratch<double> sums(outer * chunks.per_slice);
  chunks.each(
      [&](int64_t chunk, int64_t, int64_t at, int64_t n) { sums[chunk] = storage.sum(n, x + at); });
  const Scratch<acc_t<T>> means(outer);
  for (int64_t o = 0; o < outer; ++o) {
    const double* own = sums.get() + o * chunks.per_slice;
    means[o] = mean(std::accumulate(own, own + chunks.per_slice, 0.0));
  }
  chunks.each([&](int64_t, int64_t o, int64_t at, int64_t n) {
    storage.subtract(n, x + at, means[o], out + at);
  });
}

// inner > 1: a mean per column of each (count, inner) slice.
template <class T>
void center_columns(int64_t outer, int64_t count, int64_t inner, const T* x, T* out) {
  const auto& storage = kernels().storage<T>();
  const Chunks chunks{outer, count, inner, kRowChunk};
  const Scratch<double> sums(outer * chunks.per_slice * inner, 0.0);
  chunks.each([&](int64_t chunk, int64_t, int64_t at, int64_t rows) {
    storage.column_sums(rows, inner, x + at, inner, sums.get() + chunk * inner);
  });
  const Scratch<acc_t<T>> means(outer * inner);
  for (int64_t o = 0; o < outer; ++o) {
    double* total = sums.get() + o * chunks.per_slice * inner;
    for (int64_t s = 1; s < chunks.per_slice; ++s) {
      for (int64_t j = 0; j < inner; ++j) {
        total[j] += total[s * inner + j];
      }
    }
    for (int64_t j = 0; j < inner; ++j) {
      means[o * inner + j] = rounded<T>(total[j] / static_cast<double>(count));
    }
  }
  chunks.each([&](int64_t, int64_t o, int64_t at, int64_t rows) {
    storage.subtract_columns(rows, inner, x + at, inner, means.get() + o * inner, out + at);
  });
}

// For strides or dimensions that (outer, count, inner) does not cover: the averaged
// dimensions are brought to the end, in a contiguous copy, and the result back.
at::Tensor center_moved(const at::Tensor& input, at::IntArrayRef dims, const at::Tensor& output) {
  std::vector<int64_t> order, last;
  for (int64_t d = 0; d < input.dim(); ++d) {
    if (std::find(dims.begin(), dims.end(), d) == dims.end()) {
      order.push_back(d);
    }
  }
  for (const int64_t d : dims) {
    last.push_back(static_cast<int64_t>(order.size()));
    order.push_back(d);
  }
  output.permute(order).copy_(center(input.permute(order).contiguous(), last));
  return output;
}

}  // namespace

at::Tensor center(const at::Tensor& input, at::OptionalIntArrayRef dim) {
  const auto dims = center_dims(input, dim);
  if (!has_kernel(input)) {
    return center_formula(input, dim);
  }
  const at::Tensor output =
      input.is_non_overlapping_and_dense() ? empty_like_of(input) : at::empty_like(input);
  if (input.numel() == 0) {
    return output;
  }
  const auto averaged = static_cast<int64_t>(dims.size());
  const bool whole = averaged == input.dim();
  const bool adjacent = whole || dims.back() - dims.front() + 1 == averaged;
  // The mean over everything does not ask in which order memory holds the elements.
  const bool dense = input.is_contiguous() || (whole && input.is_non_overlapping_and_dense());
  if (!adjacent || !dense) {
    return center_moved(input, dims, output);
  }
  int64_t outer = 1, count = 1, inner = 1;
  for (int64_t d = 0; d < input.dim(); ++d) {
    int64_t& part = d < dims.front() ? outer : d > dims.back() ? inner : count;
    part *= input.size(d);
  }
  with_storage_type(input.scalar_type(), [&]<class T>(T) {
    if (inner == 1) {
      center_runs<T>(outer, count, data<T>(input), mutable_data<T>(output));
    } else {
      center_columns<T>(outer, count, inner, data<T>(input), mutable_data<T>(output));
    }
  });
  return output;
}

TORCH_LIBRARY_IMPL(mylayers, CPU, m) { m.impl("center", center); }

}  // namespace cpu
}  // namespace mylayers
