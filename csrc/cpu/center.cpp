// center on the CPU: x - mean(x) over all of x or over some dimensions.
//
// x is seen as (outer, count, inner), contiguous, the mean over `count`. Values are summed
// in float64 over chunks of fixed size whose sums are added in order, so neither the
// threads nor the other slices of x change a bit of the result. The mean is rounded to
// the dtype of x before it is subtracted: that is what x - x.mean() says.
#include "../center.h"

#include <ATen/ops/empty_like.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "dtypes.h"

namespace mylayers {
namespace cpu {
namespace {

// Elements per thread below which a second thread does not pay.
constexpr int64_t kGrain = 1 << 15;
// Chunk of a slice with inner > 1.
constexpr int64_t kRowChunk = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t grain(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1));
}

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

// inner = 1: every slice is a contiguous run.
template <class T>
void center_runs(int64_t outer, int64_t count, const T* x, T* out) {
  using C = acc_t<T>;
  const auto& storage = kernels().storage<T>();
  if (count <= kChunk) {
    at::parallel_for(0, outer, grain(count), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        const C mean = rounded<T>(storage.sum(count, x + o * count) / static_cast<double>(count));
        storage.subtract(count, x + o * count, mean, out + o * count);
      }
    });
    return;
  }
  const int64_t chunks = ceil_div(count, kChunk);
  std::vector<double> sums(outer * chunks);
  std::vector<C> means(outer);
  const auto each_chunk = [&](auto&& body) {
    at::parallel_for(0, outer * chunks, grain(kChunk), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t start = t % chunks * kChunk;
        body(t, t / chunks, t / chunks * count + start, std::min(kChunk, count - start));
      }
    });
  };
  each_chunk([&](int64_t t, int64_t, int64_t at, int64_t n) { sums[t] = storage.sum(n, x + at); });
  for (int64_t o = 0; o < outer; ++o) {
    double total = 0;
    for (int64_t s = 0; s < chunks; ++s) {
      total += sums[o * chunks + s];
    }
    means[o] = rounded<T>(total / static_cast<double>(count));
  }
  each_chunk([&](int64_t, int64_t o, int64_t at, int64_t n) {
    storage.subtract(n, x + at, means[o], out + at);
  });
}

// inner > 1: a mean per column of each (count, inner) slice.
template <class T>
void center_columns(int64_t outer, int64_t count, int64_t inner, const T* x, T* out) {
  using C = acc_t<T>;
  const auto& storage = kernels().storage<T>();
  const int64_t chunks = ceil_div(count, kRowChunk);
  std::vector<double> sums(outer * chunks * inner);
  std::vector<C> means(outer * inner);
  const auto each_chunk = [&](auto&& body) {
    at::parallel_for(0, outer * chunks, grain(kRowChunk * inner), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t start = t % chunks * kRowChunk;
        const int64_t at = (t / chunks * count + start) * inner;
        body(t, t / chunks, at, std::min(kRowChunk, count - start));
      }
    });
  };
  each_chunk([&](int64_t t, int64_t, int64_t at, int64_t rows) {
    storage.column_sums(rows, inner, x + at, inner, sums.data() + t * inner);
  });
  for (int64_t o = 0; o < outer; ++o) {
    double* total = sums.data() + o * chunks * inner;
    for (int64_t s = 1; s < chunks; ++s) {
      for (int64_t j = 0; j < inner; ++j) {
        total[j] += total[s * inner + j];
      }
    }
    for (int64_t j = 0; j < inner; ++j) {
      means[o * inner + j] = rounded<T>(total[j] / static_cast<double>(count));
    }
  }
  each_chunk([&](int64_t, int64_t o, int64_t at, int64_t rows) {
    storage.subtract_columns(rows, inner, x + at, inner, means.data() + o * inner, out + at);
  });
}

at::Tensor center_cpu(const at::Tensor& input, at::OptionalIntArrayRef dim) {
  const auto dims = center_dims(input, dim);
  const bool whole = static_cast<int64_t>(dims.size()) == input.dim();
  const bool adjacent =
      !dims.empty() && dims.back() - dims.front() + 1 == static_cast<int64_t>(dims.size());
  // The mean over everything does not ask in which order memory holds the elements.
  const bool in_place_order =
      input.is_contiguous() || (whole && input.is_non_overlapping_and_dense());
  const auto dtype = input.scalar_type();
  if (!(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
        dtype == at::kBFloat16)) {
    return center_formula(input, dim);
  }
  const at::Tensor output = at::empty_like(input);
  if (input.numel() == 0) {
    return output;
  }
  if (!in_place_order || !(whole || adjacent)) {
    // Bring the averaged dimensions to the end, in a contiguous copy, and come back.
    std::vector<int64_t> order;
    for (int64_t d = 0; d < input.dim(); ++d) {
      if (std::find(dims.begin(), dims.end(), d) == dims.end()) {
        order.push_back(d);
      }
    }
    const auto kept = static_cast<int64_t>(order.size());
    order.insert(order.end(), dims.begin(), dims.end());
    const at::Tensor moved = input.permute(order).contiguous();
    std::vector<int64_t> last;
    for (int64_t d = kept; d < input.dim(); ++d) {
      last.push_back(d);
    }
    output.permute(order).copy_(center_cpu(moved, last));
    return output;
  }
  int64_t outer = 1, count = 1, inner = 1;
  for (int64_t d = 0; d < input.dim(); ++d) {
    int64_t& part = whole || (d >= dims.front() && d <= dims.back()) ? count
                    : d < dims.front()                               ? outer
                                                                     : inner;
    part *= input.size(d);
  }
  with_storage_type(dtype, [&]<class T>(T) {
    if (inner == 1) {
      center_runs<T>(outer, count, data<T>(input), mutable_data<T>(output));
    } else {
      center_columns<T>(outer, count, inner, data<T>(input), mutable_data<T>(output));
    }
  });
  return output;
}

TORCH_LIBRARY_IMPL(mylayers, CPU, m) { m.impl("center", center_cpu); }

}  // namespace
}  // namespace cpu
}  // namespace mylayers
