// Products of few rows of a, or of few of b: b is read as it lies, along its rows.

// kVectors vectors of kSteps rows of b; whole ones but for the last, of which there are `lanes`.
// Those that are used again stay in registers: g++ 12 made them operands in memory of every
// multiply-add. Those that are not are read further ahead without an instruction of their own.
template <bool kAgain, int kSteps, int kVectors, class T, class C = acc_t<T>>
INLINE void load_rows(const T* b, int64_t b_row, int lanes, vec<C> (&row)[kSteps][kVectors]) {
  constexpr int L = kLanes<C>;
  UNROLL
  for (int s = 0; s < kSteps; ++s) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      row[s][v] = load_n(b + s * b_row + v * L, v + 1 < kVectors ? L : lanes);
      if constexpr (kAgain) {
        row[s][v] = in_register(row[s][v]);
      }
    }
  }
}

// sums (kRows, columns of row) += a (kRows, kSteps) @ row, of as many columns as load_rows loaded.
template <int kRows, class C, int kSteps, int kVectors>
INLINE void add_products(
    const C* a, int64_t a_row, const vec<C> (&row)[kSteps][kVectors], C* sums, int64_t sums_row,
    bool accumulate, int lanes) {
  constexpr int L = kLanes<C>;
  vec<C> sum[kRows][kVectors];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const C* from = sums + i * sums_row + v * L;
      sum[i][v] = accumulate ? load_n(from, v + 1 < kVectors ? L : lanes) : vec<C>{};
    }
  }
  UNROLL
  for (int s = 0; s < kSteps; ++s) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const C x = a[i * a_row + s];
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = multiply_add<C>(splat(x), row[s][v], sum[i][v]);
      }
    }
  }
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store_n(sums + i * sums_row + v * L, sum[i][v], v + 1 < kVectors ? L : lanes);
    }
  }
}

// c (kRows, columns) += x (kRows, kSteps) @ b, for kVectors vectors of columns.
template <class T, int kRows, int kSteps, int kVectors, class C = acc_t<T>>
INLINE void stream_middle(const C* x, const T* b, int64_t b_row, C* c, int64_t c_row, int lanes) {
  vec<C> row[kSteps][kVectors];
  load_rows<(kRows > 1)>(b, b_row, lanes, row);
  add_products<kRows>(x, kSteps, row, c, c_row, true, lanes);
}

// One pass of stream: c (kRows, n) = act(c0 + a (kRows, kSteps) @ b (kSteps, n) + bias).
template <class T, int kRows, int kSteps, class C = acc_t<T>>
void stream_pass(
    int64_t n, const C* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, Source source,
    C* c, int64_t c_row, bool accumulate, bool finish, const C* bias, Activation act) {
  C x[kRows * kSteps];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int s = 0; s < kSteps; ++s) {
      x[i * kSteps + s] = load_bits<C>(a + i * a_row + s * a_col);
    }
  }
  // A pass between the first and the last has nothing to decide for each vector: 4 rows of
  // 1024 x 1024 took 1.1 to 1.2 times as long with the loop below. Of one row two vectors are read
  // of each row of b: 1 x 4096 x 4096 took 1.03 to 1.05 times as long by one in float16 and
  // float32.
  if (accumulate && !finish) {
    constexpr int L = kLanes<C>;
    constexpr int kVectors = kRows == 1 ? 2 : 1;
    int64_t j = 0;
    _Pragma("GCC unroll 1") for (; j + kVectors * L <= n; j += kVectors * L) {
      if (source == Source::kMemoryByLevel2) {
        prefetch_rows_below<kSteps, kVectors>(b + j, b_row);
      }
      stream_middle<T, kRows, kSteps, kVectors>(x, b + j, b_row, c + j, c_row, L);
    }
    for (; j < n; j += L) {
      stream_middle<T, kRows, kSteps, 1>(
          x, b + j, b_row, c + j, c_row, static_cast<int>(n - j < L ? n - j : L));
    }
    return;
  }
  // One vector at a time: by four the prefetcher lost track of b, and 1 x 4096 x 4096 took 1.06 to
  // 1.22 of the time, 256 x 8 x 1024, which has no other pass, 1.06.
  const auto pass = [&]<bool kPlain>(std::bool_constant<kPlain>) __attribute__((always_inline)) {
    for_vectors<C, 1>(
        n, BODY {
          vec<C> row[kSteps];
          UNROLL
          for (int s = 0; s < kSteps; ++s) {
            row[s] = load_n(b + s * b_row + j, n);
          }
          UNROLL
          for (int i = 0; i < kRows; ++i) {
            C* out = c + i * c_row + j;
            vec<C> sum = !kPlain && accumulate ? load_n(out, n) : vec<C>{};
            UNROLL
            for (int s = 0; s < kSteps; ++s) {
              sum = multiply_add<C>(splat(x[i * kSteps + s]), row[s], sum);
            }
            if (!kPlain && finish) {
              sum = bias ? add_in_order<C>(sum, load_n(bias + j, n)) : sum;
              sum = activate_in_tile<C>(sum, act);
            }
            store_n(out, sum, n);
          }
        });
  };
  if (!accumulate && (!finish || (!bias && act != Activation::kRelu))) {
    pass(std::true_type{});
  } else {
    pass(std::false_type{});
  }
}

template <class T, class C = acc_t<T>>
using StreamPass = void (*)(
    int64_t, const C*, int64_t, int64_t, const T*, int64_t, Source, C*, int64_t, bool, bool,
    const C*, Activation);

template <class T, int kRows, int kSteps = kStreamDepth>
StreamPass<T> stream_pass_of(int64_t steps) {
  if constexpr (kSteps > 1) {
    if (steps < kSteps) {
      return stream_pass_of<T, kRows, sizeof(T) == 2 ? kSteps / 2 : kSteps - 1>(steps);
    }
  }
  return stream_pass<T, kRows, kSteps>;
}

// The products of a few rows of a with a few rows of b at a time, along all of n. Memory is read
// and written in long runs, where tiles would touch short pieces of many rows. The sums are kept in
// c meanwhile. The prefetcher follows four rows of b best, eight of float16; more sums, or a
// product that is over after kStreamDepth rows, rather touch c less often. From memory six: every
// store of a sum waits for the lines of b that it adds, and a core waits with so many stores only.
// 1 x 4096 x 4096 by four took 1.03 to 1.18 of the time, 2 x 4096 x 4096 1.15 to 1.2; from a cache,
// on one thread, 2 x 1024 x 1024 by six took 1.03. Of an outer product, or two, long rows are
// written one after another: four at a time took 1.1 to 1.45 of the time from 256 columns on, and
// half of it at 64.
template <class T, class C = acc_t<T>>
void stream(
    int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, int64_t a_col, const T* b,
    int64_t b_row, Source source, C* c, int64_t c_row, bool accumulate, bool finish, const C* bias,
    Activation act) {
  constexpr StreamPass<T> (*by_rows[kStreamRows])(int64_t) = {
      stream_pass_of<T, 1>, stream_pass_of<T, 2>, stream_pass_of<T, 3>, stream_pass_of<T, 4>};
  const int64_t together = k <= 2 && n >= 256 ? 1 : kStreamRows;
  for (int64_t i = 0; i < m; i += together) {
    const int64_t rows = m - i < together ? m - i : together;
    const bool deep = rows > 2 || k <= kStreamDepth || sizeof(T) == 2;
    const int64_t most = deep ? kStreamDepth : source == Source::kCache ? 4 : 6;
    for (int64_t p = 0, steps = 0; p < k; p += steps) {
      steps = k - p < most ? k - p : most;
      if constexpr (sizeof(T) == 2) {  // the last few in passes of 4, 2 and 1: half the code
        steps = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(steps)));
      }
      by_rows[rows - 1](steps)(
          n, a + i * a_row + p * a_col, a_row, a_col, b + p * b_row, b_row, source, c + i * c_row,
          c_row, accumulate || p > 0, finish && p + steps == k, bias, act);
    }
    if (finish && !row_of(act).in_registers) {
      activate(rows, n, c + i * c_row, c_row, act);
    }
  }
}

// kSteps steps of stream_many, for kVectors vectors of columns.
template <class T, int kSteps, int kVectors, class C = acc_t<T>>
INLINE void stream_columns(
    int64_t m, const C* a, int64_t a_row, const T* b, int64_t b_row, C* sums, int64_t sums_row,
    bool accumulate, int lanes) {
  vec<C> row[kSteps][kVectors];
  load_rows<true>(b, b_row, lanes, row);
  int64_t i = 0;
  for (; i + kManyTogether <= m; i += kManyTogether) {
    add_products<kManyTogether>(
        a + i * a_row, a_row, row, sums + i * sums_row, sums_row, accumulate, lanes);
  }
  if (i < m) {
    add_products<1>(a + i * a_row, a_row, row, sums + i * sums_row, sums_row, accumulate, lanes);
  }
}

template <class T, int kSteps, class C = acc_t<T>>
void stream_many_pass(
    int64_t m, int64_t n, const C* a, int64_t a_row, const T* b, int64_t b_row, Source source,
    C* sums, int64_t sums_row, bool accumulate) {
  constexpr int L = kLanes<C>;
  int64_t j = 0;
  for (; j + kManyVectors * L <= n; j += kManyVectors * L) {
    if (source == Source::kMemoryByLevel2) {
      prefetch_rows_below<kSteps, kManyVectors>(b + j, b_row);
    }
    stream_columns<T, kSteps, kManyVectors>(
        m, a, a_row, b + j, b_row, sums + j, sums_row, accumulate, L);
  }
  for (; j < n; j += L) {
    stream_columns<T, kSteps, 1>(
        m, a, a_row, b + j, b_row, sums + j, sums_row, accumulate,
        static_cast<int>(n - j < L ? n - j : L));
  }
}

// As stream, where more rows share what is read: a vector of b serves them all, and is widened
// once.
template <class T, class C = acc_t<T>>
void stream_many(
    int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, const T* b, int64_t b_row,
    Source source, C* sums, int64_t sums_row, bool accumulate) {
  constexpr auto passes = []<int... kStep>(std::integer_sequence<int, kStep...>) {
    return std::array{stream_many_pass<T, kStep + 1>...};
  }(std::make_integer_sequence<int, kManySteps>{});
  for (int64_t p = 0; p < k; p += kManySteps) {
    passes[(k - p < kManySteps ? k - p : kManySteps) - 1](
        m, n, a + p, a_row, b + p * b_row, b_row, source, sums, sums_row, accumulate || p > 0);
  }
}
