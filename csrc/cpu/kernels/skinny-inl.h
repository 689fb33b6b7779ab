// Products of few rows of a, or of few of b: b is read as it lies, along its rows.

// kVectors vectors of kSteps rows of b; whole ones but for the last, of which there are `lanes`.
// Those that are used again stay in registers: g++ 12 made them operands in memory of every
// multiply-add. Those that are not are read further ahead without an instruction of their own.
template <bool kAgain, int kSteps, int kVectors, class T, class C = acc_t<T>>
INLINE void load_rows(const T* b, int64_t ldb, int lanes, vec<C> (&row)[kSteps][kVectors]) {
  constexpr int L = kLanes<C>;
  UNROLL
  for (int s = 0; s < kSteps; ++s) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      row[s][v] = load_n(b + s * ldb + v * L, v + 1 < kVectors ? L : lanes);
      if constexpr (kAgain) {
        row[s][v] = in_register(row[s][v]);
      }
    }
  }
}

// sums (kRows, columns of row) += a (kRows, kSteps) @ row, of as many columns as load_rows loaded.
template <int kRows, class C, int kSteps, int kVectors>
INLINE void add_products(
    const C* a, int64_t lda, const vec<C> (&row)[kSteps][kVectors], C* sums, int64_t ld_sums,
    bool accumulate, int lanes) {
  constexpr int L = kLanes<C>;
  vec<C> sum[kRows][kVectors];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const C* from = sums + i * ld_sums + v * L;
      sum[i][v] = accumulate ? load_n(from, v + 1 < kVectors ? L : lanes) : vec<C>{};
    }
  }
  UNROLL
  for (int s = 0; s < kSteps; ++s) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const C x = a[i * lda + s];
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
      store_n(sums + i * ld_sums + v * L, sum[i][v], v + 1 < kVectors ? L : lanes);
    }
  }
}

// c (kRows, columns) += x (kRows, kSteps) @ b, for kVectors vectors of columns.
template <class T, int kRows, int kSteps, int kVectors, class C = acc_t<T>>
INLINE void skinny_middle(const C* x, const T* b, int64_t ldb, C* c, int64_t ldc, int lanes) {
  vec<C> row[kSteps][kVectors];
  load_rows<(kRows > 1)>(b, ldb, lanes, row);
  add_products<kRows>(x, kSteps, row, c, ldc, true, lanes);
}

// One pass of skinny: c (kRows, n) = act(c0 + a (kRows, kSteps) @ b (kSteps, n) + bias).
template <class T, int kRows, int kSteps, class C = acc_t<T>>
void skinny_pass(
    int64_t n, const C* a, int64_t lda, int64_t a_col, const T* b, int64_t ldb, Residency residency,
    C* c, int64_t ldc, bool accumulate, bool epilogue, const C* bias, Activation act) {
  C x[kRows * kSteps];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int s = 0; s < kSteps; ++s) {
      x[i * kSteps + s] = load_bits<C>(a + i * lda + s * a_col);
    }
  }
  // A pass between the first and the last has nothing to decide for each vector, so it has a loop
  // of its own. For one row of a, two vectors are read of each row of b. [lab: constants]
  if (accumulate && !epilogue) {
    constexpr int L = kLanes<C>;
    constexpr int kVectors = kRows == 1 ? 2 : 1;
    int64_t j = 0;
    _Pragma("GCC unroll 1") for (; j + kVectors * L <= n; j += kVectors * L) {
      if (residency == Residency::kMemoryByLevel2) {
        prefetch_next_rows<kSteps, kVectors>(b + j, ldb);
      }
      skinny_middle<T, kRows, kSteps, kVectors>(x, b + j, ldb, c + j, ldc, L);
    }
    for (; j < n; j += L) {
      skinny_middle<T, kRows, kSteps, 1>(
          x, b + j, ldb, c + j, ldc, static_cast<int>(n - j < L ? n - j : L));
    }
    return;
  }
  // One vector at a time: by four the prefetcher loses track of b. [lab: constants]
  const auto pass = [&]<bool kPlain>(std::bool_constant<kPlain>) __attribute__((always_inline)) {
    for_vectors<C, 1>(
        n, BODY {
          vec<C> row[kSteps];
          UNROLL
          for (int s = 0; s < kSteps; ++s) {
            row[s] = load_n(b + s * ldb + j, n);
          }
          UNROLL
          for (int i = 0; i < kRows; ++i) {
            C* out = c + i * ldc + j;
            vec<C> sum = !kPlain && accumulate ? load_n(out, n) : vec<C>{};
            UNROLL
            for (int s = 0; s < kSteps; ++s) {
              sum = multiply_add<C>(splat(x[i * kSteps + s]), row[s], sum);
            }
            if (!kPlain && epilogue) {
              sum = bias ? add_in_order<C>(sum, load_n(bias + j, n)) : sum;
              sum = activate_in_registers<C>(sum, act);
            }
            store_n(out, sum, n);
          }
        });
  };
  if (!accumulate && (!epilogue || (!bias && act != Activation::kRelu))) {
    pass(std::true_type{});
  } else {
    pass(std::false_type{});
  }
}

template <class T, class C = acc_t<T>>
using SkinnyPass = void (*)(
    int64_t, const C*, int64_t, int64_t, const T*, int64_t, Residency, C*, int64_t, bool, bool,
    const C*, Activation);

template <class T, int kRows, int kSteps = kSkinnyTerms>
SkinnyPass<T> skinny_pass_of(int64_t steps) {
  if constexpr (kSteps > 1) {
    if (steps < kSteps) {
      return skinny_pass_of<T, kRows, sizeof(T) == 2 ? kSteps / 2 : kSteps - 1>(steps);
    }
  }
  return skinny_pass<T, kRows, kSteps>;
}

// The products of a few rows of a with a few rows of b at a time, along all of n. Memory is read
// and written in long runs, where microkernels would touch short pieces of many rows. The sums are
// kept in c meanwhile. The prefetcher follows four rows of b best, eight of float16; more sums, or
// a product that is over after kSkinnyTerms rows, rather touch c less often. From memory six: every
// store of a sum waits for the lines of b that it adds, and a core waits with so many stores only.
// Of an outer product, or two, long rows are written one after another, short ones four at a time.
// [lab: constants]
template <class T, class C = acc_t<T>>
void skinny(
    int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, int64_t a_col, const T* b,
    int64_t ldb, Residency residency, C* c, int64_t ldc, bool accumulate, bool epilogue,
    const C* bias, Activation act) {
  constexpr SkinnyPass<T> (*by_rows[kSkinnyRows])(int64_t) = {
      skinny_pass_of<T, 1>, skinny_pass_of<T, 2>, skinny_pass_of<T, 3>, skinny_pass_of<T, 4>};
  const int64_t together = k <= 2 && n >= 256 ? 1 : kSkinnyRows;
  for (int64_t i = 0; i < m; i += together) {
    const int64_t rows = m - i < together ? m - i : together;
    const bool deep = rows > 2 || k <= kSkinnyTerms || sizeof(T) == 2;
    const int64_t most = deep ? kSkinnyTerms : residency == Residency::kCache ? 4 : 6;
    for (int64_t p = 0, steps = 0; p < k; p += steps) {
      steps = k - p < most ? k - p : most;
      if constexpr (sizeof(T) == 2) {  // the last few in passes of 4, 2 and 1: half the code
        steps = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(steps)));
      }
      by_rows[rows - 1](steps)(
          n, a + i * lda + p * a_col, lda, a_col, b + p * ldb, ldb, residency, c + i * ldc, ldc,
          accumulate || p > 0, epilogue && p + steps == k, bias, act);
    }
    if (epilogue && !row_of(act).in_registers) {
      activate(rows, n, c + i * ldc, ldc, act);
    }
  }
}

// kSteps steps of skinny_many, for kVectors vectors of columns.
template <class T, int kSteps, int kVectors, class C = acc_t<T>>
INLINE void skinny_many_columns(
    int64_t m, const C* a, int64_t lda, const T* b, int64_t ldb, C* sums, int64_t ld_sums,
    bool accumulate, int lanes) {
  vec<C> row[kSteps][kVectors];
  load_rows<true>(b, ldb, lanes, row);
  int64_t i = 0;
  for (; i + kManyTogether <= m; i += kManyTogether) {
    add_products<kManyTogether>(
        a + i * lda, lda, row, sums + i * ld_sums, ld_sums, accumulate, lanes);
  }
  if (i < m) {
    add_products<1>(a + i * lda, lda, row, sums + i * ld_sums, ld_sums, accumulate, lanes);
  }
}

template <class T, int kSteps, class C = acc_t<T>>
void skinny_many_pass(
    int64_t m, int64_t n, const C* a, int64_t lda, const T* b, int64_t ldb, Residency residency,
    C* sums, int64_t ld_sums, bool accumulate) {
  constexpr int L = kLanes<C>;
  int64_t j = 0;
  for (; j + kManyVectors * L <= n; j += kManyVectors * L) {
    if (residency == Residency::kMemoryByLevel2) {
      prefetch_next_rows<kSteps, kManyVectors>(b + j, ldb);
    }
    skinny_many_columns<T, kSteps, kManyVectors>(
        m, a, lda, b + j, ldb, sums + j, ld_sums, accumulate, L);
  }
  for (; j < n; j += L) {
    skinny_many_columns<T, kSteps, 1>(
        m, a, lda, b + j, ldb, sums + j, ld_sums, accumulate,
        static_cast<int>(n - j < L ? n - j : L));
  }
}

// As skinny, where more rows share what is read: a vector of b serves them all, and is widened
// once.
template <class T, class C = acc_t<T>>
void skinny_many(
    int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, const T* b, int64_t ldb,
    Residency residency, C* sums, int64_t ld_sums, bool accumulate) {
  constexpr auto passes = []<int... kStep>(std::integer_sequence<int, kStep...>) {
    return std::array{skinny_many_pass<T, kStep + 1>...};
  }(std::make_integer_sequence<int, kManySteps>{});
  for (int64_t p = 0; p < k; p += kManySteps) {
    passes[(k - p < kManySteps ? k - p : kManySteps) - 1](
        m, n, a + p, lda, b + p * ldb, ldb, residency, sums, ld_sums, accumulate || p > 0);
  }
}
