// The macrokernel: a block of c in microkernels.

// Rows of the next microkernel of as few and as equal ones as `left` rows make: 16 rows are 6, 5
// and 5. [lab: constants]
constexpr int64_t next_height(int64_t left, int64_t most) {
  const int64_t microkernels = (left + most - 1) / most;
  return (left + microkernels - 1) / microkernels;
}

// Vectors of most micropanels of k rows that m rows multiply (NR). As many rows as one microkernel
// of a vector less can take read b once, where two of the usual ones would read it twice. Where
// sums of few terms are stored often, micropanels are to be of whole lines: of two of AVX2's
// vectors, not three. [lab: constants]
INLINE int usual_vectors(int64_t m, int64_t k) {
  const bool one_microkernel = kNrVectors > 2 && m > kMr && m <= mr_of(kNrVectors - 1);
  const bool short_sums = kNrVectors == 3 && k <= 32;
  return one_microkernel || short_sums ? kNrVectors - 1 : kNrVectors;
}

// Columns of the next micropanel of `left` columns. Four vectors are two and two where three are
// the most, since a microkernel of one needs a load for each multiply-add.
template <class C>
INLINE int64_t next_width(int64_t left, int64_t m, int64_t k) {
  constexpr int64_t L = kLanes<C>;
  const int64_t vectors = kNrVectors == 3 && (left + L - 1) / L == 4 ? 2 : usual_vectors(m, k);
  return left < vectors * L ? left : vectors * L;
}

template <class C>
void macrokernel(
    int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, int64_t a_col, bool first, const C* b,
    int64_t ldb, bool in_micropanels, C* c, int64_t ldc, bool accumulate, bool epilogue,
    const C* bias, Activation act, PackBuffers<C> buffers) {
  constexpr int L = kLanes<C>;
  const bool activates_after = epilogue && !row_of(act).in_registers;
  if (m == 1 && !in_micropanels) {
    for (int64_t j = 0, cols = 0; j < n; j += cols) {
      cols = n - j < kRowVectors * L ? n - j : kRowVectors * L;
      const int tail = static_cast<int>(cols % L);
      microkernel_of_one_row<C>(static_cast<int>((cols + L - 1) / L), tail != 0)(
          k, a, lda, a_col, /*prefetches_a=*/false, b + j, ldb, c + j, ldc, /*prefetches_c=*/false,
          tail, accumulate, epilogue, bias ? bias + j : nullptr, act, {});
    }
    if (activates_after) {
      activate(1, n, c, ldc, act);
    }
    return;
  }
  for (int64_t j = 0, cols = 0; j < n; j += cols) {
    cols = next_width<C>(n - j, m, k);
    const int tail = static_cast<int>(cols % L);
    const int vectors = static_cast<int>((cols + L - 1) / L);
    // The copy of a is one of microkernels of the usual height.
    const int most = mr_of(buffers.a ? usual_vectors(m, k) : vectors);
    const Microkernel<C>* usual = microkernels<C>(vectors, tail != 0);
    const bool reads_a = first && j == 0;
    const bool copies_b = buffers.b && tail == 0 && vectors >= kLeastCopied && m > most;
    const C* micropanel = b + (in_micropanels ? j * k : j);
    int64_t micropanel_ld = in_micropanels ? vectors * L : ldb, rows = 0;
    for (int64_t i = 0; i < m; i += rows) {
      rows = next_height(m - i, most);
      const bool below = i + rows < m;
      C* kept = buffers.a ? buffers.a + i * k : nullptr;
      const bool fills_a = kept && reads_a, fills_b = copies_b && i == 0;
      const Microkernel<C>* by_rows =
          fills_a || fills_b ? copying_microkernels<C>(vectors, fills_a, fills_b) : usual;
      const bool from_kept = kept && !reads_a;
      by_rows[rows - 1](
          k, from_kept ? kept : a + i * lda, from_kept ? 1 : lda, from_kept ? rows : a_col,
          reads_a && a_col == 1 && below, micropanel, micropanel_ld, c + i * ldc + j, ldc,
          kCopies && below, tail, accumulate, epilogue, bias ? bias + j : nullptr, act,
          {kept, buffers.b});
      if (activates_after) {
        activate(rows, cols, c + i * ldc + j, ldc, act);
      }
      if (fills_b) {
        micropanel = buffers.b;
        micropanel_ld = cols;
      }
    }
  }
}
