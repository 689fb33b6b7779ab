// Products of few rows of a with a weight (out, in): its columns are read as they lie.

// c = act(a (kRows, k) @ b (k, n) + bias) for kGroups vectors of columns, whole ones, or for one
// that n cuts, of a and a transposed b with unit strides along k. Squares of b are transposed in
// registers and used at once, one read of b being all that few rows of a pay for; the sums stay in
// registers over all terms. From memory (kFar) its lines are prefetched ahead.
template <class C, int kRows, int kGroups, bool kWhole, bool kFar>
INLINE void skinny_transposed_columns(
    int64_t n, int64_t k, const C* a, int64_t lda, const C* b, int64_t ldb, Residency residency,
    C* c, int64_t ldc, const C* bias, Activation act) {
  constexpr int L = kLanes<C>;
  constexpr int kSquares = 64 / kBytes;  // in a row of lines, which are used up once they are there
  // Beyond n the last column again. Offsets serve all groups; as many pointers would not stay in
  // registers.
  int64_t offsets[L];
  UNROLL
  for (int l = 0; l < L; ++l) {
    offsets[l] = (kWhole || l < n ? l : n - 1) * ldb;
  }
  vec<C> sum[kGroups][kRows] = {};
  const auto add_square =
      [&]<int kSteps>(std::integer_sequence<int, kSteps>, int g, int64_t p, int steps)
          __attribute__((always_inline)) {
            const C* first = b + g * L * ldb + p;
            vec<C> square[L];
            if constexpr (kSteps == L) {
              load_transposed<C>(square, [&](int l) { return first + offsets[l]; });
            } else {
              UNROLL
              for (int l = 0; l < L; ++l) {
                square[l] = load_part(first + offsets[l], steps);
              }
              transpose<C>(square);
            }
            UNROLL
            for (int s = 0; s < kSteps; ++s) {
              if (s < steps) {
                UNROLL
                for (int i = 0; i < kRows; ++i) {
                  const C x = load_bits<C>(a + i * lda + p + s);
                  sum[g][i] = multiply_add<C>(splat(x), square[s], sum[g][i]);
                }
              }
            }
          };
  // How many steps a square has at most: what the compiler is not told, it warns about.
  constexpr std::integer_sequence<int, L> whole;
  constexpr std::integer_sequence<int, L - 1> part;
  int64_t p = 0;
  for (; p + kSquares * L <= k; p += kSquares * L) {
    UNROLL
    for (int g = 0; g < kGroups; ++g) {
      if constexpr (kFar) {
        UNROLL
        for (int l = 0; l < L; ++l) {
          const C* row = b + g * L * ldb + p + offsets[l];
          if (residency == Residency::kMemoryByLevel2) {
            prefetch<2>(row, kAheadInRow / sizeof(C));
          } else {
            prefetch(row, kAheadInRow / sizeof(C));
          }
        }
      }
      UNROLL
      for (int q = 0; q < kSquares; ++q) {
        add_square(whole, g, p + q * L, L);
      }
    }
  }
  for (; p + L <= k; p += L) {
    UNROLL
    for (int g = 0; g < kGroups; ++g) {
      add_square(whole, g, p, L);
    }
  }
  if (const int rest = static_cast<int>(k % L); rest > 0) {
    UNROLL
    for (int g = 0; g < kGroups; ++g) {
      add_square(part, g, p, rest);
    }
  }
  const int lanes = kWhole || n > L ? L : static_cast<int>(n);
  UNROLL
  for (int g = 0; g < kGroups; ++g) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const vec<C> out = bias ? add_in_order<C>(sum[g][i], load_n(bias + g * L, lanes)) : sum[g][i];
      store_n(c + i * ldc + g * L, activate_in_registers<C>(out, act), lanes);
    }
  }
}

// A sum waits for its last multiply-add, so one or two rows take two vectors of columns, unless
// these lie in the same sets of the caches. [lab: constants]
template <class C, int kRows, bool kFar>
void skinny_transposed_rows(
    int64_t n, int64_t k, const C* a, int64_t lda, const C* b, int64_t ldb, Residency residency,
    C* c, int64_t ldc, const C* bias, Activation act) {
  constexpr int L = kLanes<C>;
  constexpr int kGroups = kRows <= 2 ? 2 : 1;
  const bool aliases = ldb * static_cast<int64_t>(sizeof(C)) % 4096 == 0;
  int64_t j = 0;
  const auto next = [&]<int kMany, bool kWhole>(
                        std::integer_sequence<int, kMany>, std::bool_constant<kWhole>) {
    skinny_transposed_columns<C, kRows, kMany, kWhole, kFar>(
        n - j, k, a, lda, b + j * ldb, ldb, residency, c + j, ldc, bias ? bias + j : nullptr, act);
    j += kMany * L;
  };
  while (!aliases && j + kGroups * L <= n) {
    next(std::integer_sequence<int, kGroups>{}, std::true_type{});
  }
  while (j + L <= n) {
    next(std::integer_sequence<int, 1>{}, std::true_type{});
  }
  if (j < n) {
    next(std::integer_sequence<int, 1>{}, std::false_type{});
  }
}

template <class C>
void skinny_transposed(
    int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, const C* b, int64_t ldb,
    Residency residency, C* c, int64_t ldc, const C* bias, Activation act) {
  constexpr decltype(&skinny_transposed_rows<C, 1, false>) by_rows[2][kSkinnyRows] = {
      {skinny_transposed_rows<C, 1, false>, skinny_transposed_rows<C, 2, false>,
       skinny_transposed_rows<C, 3, false>, skinny_transposed_rows<C, 4, false>},
      {skinny_transposed_rows<C, 1, true>, skinny_transposed_rows<C, 2, true>,
       skinny_transposed_rows<C, 3, true>, skinny_transposed_rows<C, 4, true>}};
  by_rows[residency != Residency::kCache][m - 1](
      n, k, a, lda, b, ldb, residency, c, ldc, bias, act);
  if (!row_of(act).in_registers) {
    activate(m, n, c, ldc, act);
  }
}
