// center on the CPU: x - mean(x) over all of x or over some dimensions.
//
// Sums are cut into chunks of fixed size (kernels.h) and these added in order in float64, so the
// threads change no bit of the result, nor do the other slices of x. The mean is rounded to the
// dtype of x before it is subtracted: that is what x - x.mean() says.
#include "../center.h"

#include <ATen/ops/empty_like.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "ceil_div.h"
#include "dtypes.h"
#include "machine/tuning.h"
#include "scratch.h"
#include "team.h"

namespace mylayers {
namespace cpu {
namespace {

// Elements per thread below which a second thread does not pay.
constexpr int64_t kGrain = 1 << 15;
// Slices per thread from which each is left to one thread, which may be late by one slice.
constexpr int64_t kSlicesPerThread = 4;
// Bytes of a run up to which it is subtracted from before the next is summed: half of a level-1
// cache. Longer runs are all summed first. Half of it where the result is written by non-temporal
// stores. [lab: constants]
constexpr int64_t kRunInCache = 1 << 14;
// Columns of a strip where there are more than kStrip. [lab: constants]
constexpr int64_t kWideStrip = 1024;

// Whether a result of so many bytes is written by non-temporal stores: on processors that gain by
// it (Tuning), where it and x do not fit in level 3 together; a quarter more on several threads, as
// what just fits is read from there again. From 32 MiB, malloc's largest threshold, results are
// fresh memory, whose pages the operating system has just written to the caches. Its rows, of
// row_bytes, must be whole cache lines: those written in two parts take longer. [lab: constants]
bool stores_non_temporal(const void* out, int64_t row_bytes, int64_t bytes, int64_t shares) {
  constexpr int64_t kLine = 64, kFresh = int64_t{32} << 20;
  const int64_t level3 = machine().level3_bytes;
  return level3 > 0 && bytes < kFresh && 2 * bytes >= (shares == 1 ? level3 : level3 / 4 * 5) &&
         row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(out) % kLine == 0;
}

// body(begin, end) for slices of one thread, whose second pass finds in its cache what the first
// has read, if the slice is not too long.
template <class Body>
void each_on_one_thread(int64_t slices, int64_t elements, const Body& body) {
  at::parallel_for(0, slices, std::max<int64_t>(1, kGrain / elements), body);
}

// inner = 1: every slice is a contiguous run, or `lead` of them.
template <class T>
void center_runs(const CenterSizes& s, const T* x, T* out) {
  constexpr int64_t kSize = sizeof(T);
  const auto& storage = kernels().storage<T>();
  const int64_t shares = std::min(Team::threads(), ceil_div(s.elements(), kGrain));
  const int64_t row_bytes = s.lead * s.outer == 1 ? 0 : s.count * kSize;  // 0: no second row
  const bool non_temporal = stores_non_temporal(out, row_bytes, s.elements() * kSize, shares);
  if (s.lead == 1 && s.count * kSize <= (non_temporal ? kRunInCache / 2 : kRunInCache) &&
      (shares == 1 || s.outer >= kSlicesPerThread * shares)) {
    each_on_one_thread(s.outer, s.count, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * s.count;
      storage.center_runs(end - begin, s.count, x + at, out + at);
    });
    return;
  }
  const int64_t per_run = ceil_div(s.count, kRunChunk), chunks = s.lead * s.outer * per_run;
  c10::SmallVector<double, 64> sums, means;  // on the stack for up to 2^19 values
  sums.resize_for_overwrite(chunks);
  means.resize_for_overwrite(s.lead > 1 ? s.outer : 0);
  const auto mean = [&](int64_t o) {
    double total = 0;
    for (int64_t l = 0; l < s.lead; ++l) {
      const double* own = sums.data() + (l * s.outer + o) * per_run;
      total += std::accumulate(own, own + per_run, 0.0);
    }
    return total / static_cast<double>(s.lead * s.count);
  };
  Team::run(shares, [&](const Team& team) {
    const auto [first, last] = team.share(chunks);
    int64_t run = first / per_run, start = first % per_run * kRunChunk;
    for (int64_t chunk = first; chunk < last; ++chunk, start += kRunChunk) {
      if (start >= s.count) {
        start = 0;
        ++run;
      }
      sums[chunk] = storage.sum(std::min(kRunChunk, s.count - start), x + run * s.count + start);
    }
    team.barrier();
    if (s.lead > 1) {
      for (auto [o, end] = team.share(s.outer); o < end; ++o) {
        means[o] = mean(o);
      }
      team.barrier();
    }
    int64_t o = run % s.outer;
    for (int64_t end = last, begin; end > first; end = begin) {  // mean-inl.h: why downwards
      begin = std::max(first, run * per_run);
      const int64_t skipped = (begin - run * per_run) * kRunChunk, at = run * s.count + skipped;
      const int64_t n = std::min(s.count - skipped, (end - begin) * kRunChunk);
      storage.subtract(n, x + at, s.lead > 1 ? means[o] : mean(o), out + at, non_temporal);
      --run;
      o = (o == 0 ? s.outer : o) - 1;
    }
  });
}

// inner > 1: a mean per column of each (count, inner) slice.
template <class T>
void center_columns(const CenterSizes& s, const T* x, T* out) {
  constexpr int64_t kSize = sizeof(T);
  const auto& storage = kernels().storage<T>();
  const int64_t shares = std::min(Team::threads(), ceil_div(s.elements(), kGrain));
  const bool non_temporal = stores_non_temporal(out, s.inner * kSize, s.elements() * kSize, shares);
  // Strips of equal width, in whole cache lines.
  const int64_t strips = s.inner <= kStrip ? 1 : ceil_div(s.inner, kWideStrip);
  const int64_t width = std::min(s.inner, ceil_div(ceil_div(s.inner, strips), 64) * 64);
  if (shares == 1 || s.outer * strips >= kSlicesPerThread * shares) {
    each_on_one_thread(s.outer * strips, s.count * width, [&](int64_t begin, int64_t end) {
      if (strips == 1) {
        const int64_t at = begin * s.count * s.inner;
        storage.center_columns(
            end - begin, s.count, s.inner, x + at, s.inner, out + at, non_temporal);
        return;
      }
      for (; begin < end; ++begin) {
        const int64_t j = begin % strips * width, cols = std::min(width, s.inner - j);
        const int64_t at = begin / strips * s.count * s.inner + j;
        storage.center_columns(1, s.count, cols, x + at, s.inner, out + at, non_temporal);
      }
    });
    return;
  }
  const int64_t per_slice = ceil_div(s.count, kColumnChunk), chunks = s.outer * per_slice;
  const int64_t rows = s.outer * s.count, blocks = ceil_div(s.inner, 64);
  // Threads sum chunks of rows, whose rows they find in their caches when they subtract, unless one
  // would get 1.25 times its part of the rows or more; then columns.
  const bool by_rows =
      4 * ceil_div(chunks, shares) * std::min(kColumnChunk, s.count) * shares < 5 * rows;
  const auto first_row = [&](int64_t chunk) {
    return chunk / per_slice * s.count + chunk % per_slice * kColumnChunk;
  };
  const Scratch<double> sums(chunks * s.inner);
  Team::run(shares, [&](const Team& team) {
    const auto [first, last] = by_rows ? team.share(chunks) : std::pair(int64_t{0}, chunks);
    const auto [left, right] = by_rows ? std::pair(int64_t{0}, blocks) : team.share(blocks);
    const int64_t skipped = left * 64, summed = std::min(s.inner, right * 64) - skipped;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      storage.column_sums(
          std::min(kColumnChunk, s.count - chunk % per_slice * kColumnChunk), summed,
          x + first_row(chunk) * s.inner + skipped, s.inner,
          sums.get() + chunk * s.inner + skipped);
    }
    team.barrier();
    const auto [begin, end] =
        by_rows ? std::pair(first_row(first), first_row(last)) : team.share(rows);
    for (int64_t above, below = end; below > begin; below = above) {  // slices, downwards too
      const int64_t o = (below - 1) / s.count;
      above = std::max(begin, o * s.count);
      for (int64_t j = 0; j < s.inner; j += width) {
        const int64_t cols = std::min(width, s.inner - j), at = above * s.inner + j;
        double total[kStrip] = {};
        for (int64_t c = o * per_slice; c < (o + 1) * per_slice; ++c) {
          for (int64_t column = 0; column < cols; ++column) {
            total[column] += sums[c * s.inner + j + column];
          }
        }
        storage.subtract_columns(
            below - above, cols, x + at, s.inner, total, s.count, out + at, non_temporal);
      }
    }
  });
}

}  // namespace

at::Tensor center(const at::Tensor& input, at::OptionalIntArrayRef dim) {
  const auto dims = center_dims(input, dim);
  if (!has_kernel(input)) {
    return center_formula(input, dim);
  }
  if (!input.is_non_overlapping_and_dense()) {
    return center_moved(input, dims, at::empty_like(input), center);
  }
  const at::Tensor output = empty_like_of(input);
  if (input.numel() == 0) {
    return output;
  }
  const auto sizes = center_sizes(input, dims);
  if (!sizes.has_value()) {
    return center_moved(input, dims, output, center);
  }
  with_storage_type(input.scalar_type(), [&]<class T>(T) {
    const auto kernel = sizes->inner == 1 ? center_runs<T> : center_columns<T>;
    kernel(*sizes, data<T>(input), mutable_data<T>(output));
  });
  return output;
}

TORCH_LIBRARY_IMPL(mylayers, CPU, m) { m.impl("center", center); }

}  // namespace cpu
}  // namespace mylayers
