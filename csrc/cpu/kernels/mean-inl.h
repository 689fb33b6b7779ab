// Means, and what is subtracted from values.

constexpr int kDoubles = kLanes<double>;

INLINE double sum_lanes(Doubles v) {
  double s = 0;
  for (int l = 0; l < kDoubles; ++l) {
    s += v[l];
  }
  return s;
}

// parts[0] (and parts[1], for float) += v, widened: half of a float vector fills a double one.
INLINE void add_wide(Doubles* parts, vec<double> v) { parts[0] += v; }
INLINE void add_wide(Doubles* parts, vec<float> v) {
  half_width halves[2];
  std::memcpy(halves, &v, sizeof(v));
  parts[0] += widen(halves[0]);
  parts[1] += widen(halves[1]);
}

// Eight vectors are added in their own type, as a tree, then widened: three roundings that no
// length adds to, where widening every vector first makes the sum slower than memory.
// [lab: constants]
template <class T>
double sum(int64_t count, const T* x) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  Doubles parts[2] = {};
  int64_t done = 0;
  for (; done + 8 * L <= count; done += 8 * L) {
    const T* p = x + done;
    const vec<C> low = (load(p) + load(p + L)) + (load(p + 2 * L) + load(p + 3 * L));
    p += 4 * L;
    const vec<C> high = (load(p) + load(p + L)) + (load(p + 2 * L) + load(p + 3 * L));
    add_wide(parts, low + high);
  }
  for_vectors<C>(count - done, BODY { add_wide(parts, load_n(x + done + j, n)); });
  return sum_lanes(parts[0] + parts[1]);
}

// Means as they are subtracted: rounded to T, and torch.nan's bits for every NaN, as the order in
// which their sums met NaNs is the compiler's. Where x itself is NaN, that NaN is the first operand
// of the subtraction and passes on.
template <class T>
INLINE vec<acc_t<T>> mean_of(vec<acc_t<T>> mean) {
  const vec<acc_t<T>> v = rounded<T>(mean);
  return v != v ? splat(std::numeric_limits<acc_t<T>>::quiet_NaN()) : v;
}

// How a subtraction writes. It goes downwards: the pass of the sums went upwards, and what it has
// read last is still in cache. It goes upwards where many slices that fit in cache follow each
// other: downwards in each, the prefetcher starts anew at every turn. Below AVX-512 the last
// is as kDown. [lab: constants]
enum class Way { kUp, kDown, kDownNonTemporal };

// out = value(j, n) for every vector of `count` elements.
template <class T, Way kWay, class Value>
INLINE void write_vectors(int64_t count, T* out, Value value) {
  using C = acc_t<T>;
#if defined(MYLAYERS_HAS_STREAMING_STORES)
  if constexpr (kWay == Way::kDownNonTemporal) {
    for_vectors_down<C>(
        count, BODY {
          n == kLanes<C> ? store_non_temporal(out + j, value(j, n))
                         : store_n(out + j, value(j, n), n);
        });
    return;
  }
#endif
  if constexpr (kWay == Way::kUp) {
    for_vectors<C>(count, BODY { store_n(out + j, value(j, n), n); });
  } else {
    for_vectors_down<C>(count, BODY { store_n(out + j, value(j, n), n); });
  }
}

// Other threads can read all that was written after their next barrier.
template <Way kWay>
INLINE void finish_writing() {
#if defined(MYLAYERS_HAS_STREAMING_STORES)
  if constexpr (kWay == Way::kDownNonTemporal) {
    fence_non_temporal_stores();
  }
#endif
}

template <class T, Way kWay>
void subtract_in(int64_t count, const T* x, double mean, T* out) {
  // x - x.mean() subtracts a mean of x's own dtype.
  const vec<acc_t<T>> m = mean_of<T>(splat(static_cast<acc_t<T>>(mean)));
  write_vectors<T, kWay>(count, out, BODY { return load_n(x + j, n) - m; });
  finish_writing<kWay>();
}

template <class T>
void subtract(int64_t count, const T* x, double mean, T* out, bool non_temporal) {
  (non_temporal ? subtract_in<T, Way::kDownNonTemporal> : subtract_in<T, Way::kDown>)(count, x,
                                                                                      mean, out);
}

// Runs shorter than a vector, in blocks of many: their values are summed one after another, and
// subtracted in vectors across the ends of runs.
template <class T>
void center_short_runs(int64_t runs, int64_t count, const T* x, T* out) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  constexpr int64_t kBlock = 64;
  C values[kBlock * L];
  C means[(kBlock + 1) * L];
  double sums[kBlock];
  for (int64_t r = 0; r < runs; r += kBlock) {
    const int64_t block = runs - r < kBlock ? runs - r : kBlock, size = block * count;
    for_vectors<C>(size, BODY { store_n(values + j, load_n(x + j, n), n); });
    for (int64_t i = 0; i < block; ++i) {
      double total = 0;
      for (int64_t j = 0; j < count; ++j) {
        total += static_cast<double>(values[i * count + j]);
      }
      sums[i] = total;
    }
    for (int64_t i = 0; i < block; ++i) {
      const C mean = static_cast<C>(sums[i] / static_cast<double>(count));
      store(means + i * count, splat(mean));  // the next run's mean overwrites the excess
    }
    for_vectors<C>(
        size,
        BODY { store_n(out + j, load_n(values + j, n) - mean_of<T>(load_n(means + j, n)), n); });
    x += size;
    out += size;
  }
}

template <class T>
void center_runs(int64_t runs, int64_t count, const T* x, T* out) {
  if (count < kLanes<acc_t<T>>) {
    center_short_runs(runs, count, x, out);
    return;
  }
  for (int64_t r = 0; r < runs; ++r, x += count, out += count) {
    const double mean = sum(count, x) / static_cast<double>(count);
    subtract_in<T, Way::kUp>(count, x, mean, out);
  }
}

// Rows up to this wide, one after another in memory, are read in vectors across their ends.
constexpr int64_t kNarrow = 64;

// Eight rows, an eighth of the chunk apart, are added in C and then widened, for the reason that
// `sum` has; up to seven rows are left, which are widened one by one.
template <class T>
void column_sums(int64_t rows, int64_t cols, const T* x, int64_t ldx, double* sums) {
  using C = acc_t<T>;
  constexpr int D = kDoubles;
  const int64_t groups = rows / 8, apart = groups * ldx, added = rows - 7 * groups;
  const auto eight = [&](const T* p, int n) __attribute__((always_inline)) {
    const vec<C> low = (load_n(p, n) + load_n(p + apart, n)) +
                       (load_n(p + 2 * apart, n) + load_n(p + 3 * apart, n));
    p += 4 * apart;
    const vec<C> high = (load_n(p, n) + load_n(p + apart, n)) +
                        (load_n(p + 2 * apart, n) + load_n(p + 3 * apart, n));
    return low + high;
  };
  const auto put = [&](int64_t j, const Doubles* parts, int n) __attribute__((always_inline)) {
    for (int part = 0; part * D < n; ++part) {
      store_n(sums + j + part * D, parts[part], n - part * D < D ? n - part * D : D);
    }
  };
  if (groups == 0) {
    for_vectors<C>(
        cols, BODY {
          Doubles parts[2] = {};
          for (int64_t i = 0; i < rows; ++i) {
            add_wide(parts, load_n(x + i * ldx + j, n));
          }
          put(j, parts, n);
        });
    return;
  }
  if (cols <= kNarrow && cols == ldx) {
    C wide[(kColumnChunk / 8 + 7) * kNarrow];
    for_vectors<C>(apart, BODY { store_n(wide + j, eight(x + j, n), n); });
    for_vectors<C>((rows - 8 * groups) * cols, BODY {
      store_n(wide + apart + j, load_n(x + 8 * apart + j, n), n);
    });
    for_vectors<C>(
        cols, BODY {
          Doubles parts[2] = {};
          for (int64_t i = 0; i < added; ++i) {
            add_wide(parts, load_n(wide + i * cols + j, n));
          }
          put(j, parts, n);
        });
    return;
  }
  for (int64_t j = 0; j < cols; ++j) {
    sums[j] = 0;
  }
  const auto add = [&](int64_t j, vec<C> v, int n) __attribute__((always_inline)) {
    Doubles parts[2] = {};
    add_wide(parts, v);
    for (int part = 0; part * D < n; ++part) {
      parts[part] += load_n(sums + j + part * D, n - part * D < D ? n - part * D : D);
    }
    put(j, parts, n);
  };
  for (int64_t i = 0; i < groups; ++i) {
    for_vectors<C>(cols, BODY { add(j, eight(x + i * ldx + j, n), n); });
  }
  for (int64_t i = 8 * groups; i < rows; ++i) {
    for_vectors<C>(cols, BODY { add(j, load_n(x + i * ldx + j, n), n); });
  }
}

template <class T, Way kWay>
void subtract_columns_in(
    int64_t rows, int64_t cols, const T* x, int64_t ldx, const double* sums, int64_t count,
    T* out) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  C mean[kStrip];
  for (int64_t j = 0; j < cols; ++j) {
    mean[j] = static_cast<C>(sums[j] / static_cast<double>(count));
  }
  for_vectors<C>(cols, BODY { store_n(mean + j, mean_of<T>(load_n(mean + j, n)), n); });
  if (cols <= kNarrow && cols == ldx) {
    // The means of L rows, or of fewer, are a whole number of vectors.
    int64_t repeats = L;
    for (; repeats / 2 * cols >= 4 * L && repeats / 2 * cols % L == 0; repeats /= 2) {
    }
    const int64_t size = rows * cols, block = repeats * cols;
    for (int64_t j = cols; j < (rows < repeats ? size : block); ++j) {
      mean[j] = mean[j - cols];
    }
    static_assert(L * kNarrow <= kStrip);
    const int64_t blocks = (size + block - 1) / block;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = (kWay == Way::kUp ? b : blocks - 1 - b) * block;
      write_vectors<T, kWay>(
          size - at < block ? size - at : block, out + at,
          BODY { return load_n(x + at + j, n) - load_n(mean + j, n); });
    }
    finish_writing<kWay>();
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (kWay == Way::kUp ? i : rows - 1 - i) * ldx;
    write_vectors<T, kWay>(
        cols, out + at, BODY { return load_n(x + at + j, n) - load_n(mean + j, n); });
  }
  finish_writing<kWay>();
}

template <class T>
void subtract_columns(
    int64_t rows, int64_t cols, const T* x, int64_t ldx, const double* sums, int64_t count, T* out,
    bool non_temporal) {
  (non_temporal ? subtract_columns_in<T, Way::kDownNonTemporal>
                : subtract_columns_in<T, Way::kDown>)(rows, cols, x, ldx, sums, count, out);
}

// Values of a slice up to which its columns are subtracted from upwards too.
constexpr int64_t kSmallSlice = 1 << 15;

template <class T>
void center_columns(
    int64_t slices, int64_t rows, int64_t cols, const T* x, int64_t ldx, T* out,
    bool non_temporal) {
  for (int64_t s = 0; s < slices; ++s, x += rows * ldx, out += rows * ldx) {
    double total[kStrip], chunk[kStrip];
    for (int64_t i = 0; i < rows; i += kColumnChunk) {
      column_sums(
          rows - i < kColumnChunk ? rows - i : kColumnChunk, cols, x + i * ldx, ldx,
          i == 0 ? total : chunk);
      for (int64_t j = 0; i > 0 && j < cols; ++j) {
        total[j] += chunk[j];
      }
    }
    if (rows * cols <= kSmallSlice && !non_temporal) {
      subtract_columns_in<T, Way::kUp>(rows, cols, x, ldx, total, rows, out);
    } else {
      subtract_columns(rows, cols, x, ldx, total, rows, out, non_temporal);
    }
  }
}
