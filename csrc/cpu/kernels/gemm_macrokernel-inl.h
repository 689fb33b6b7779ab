// The macrokernel: a block of c in microkernels.

// Rows of the next tile of as few and as equal ones as `left` rows make: 16 rows in 6, 5 and 5 take
// 0.95 of the time of 6, 6 and 4.
constexpr int64_t next_height(int64_t left, int64_t most) {
  const int64_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

// Vectors of most strips of k rows that m rows multiply. As many rows as one tile of a vector less
// can take read b once: 8 x 256 x 256 took 1.06 times as long in two of AVX-512's usual tiles, 7 x
// 1024 x 1024 1.45. Where sums of few terms are stored often, strips are to be of whole lines:
// 256 x 32 x 256 took 1.2 times as long in three vectors of AVX2 as in two.
INLINE int usual_vectors(int64_t m, int64_t k) {
  const bool one_tile = kTileVectors > 2 && m > kTileRows && m <= tile_rows(kTileVectors - 1);
  const bool short_sums = kTileVectors == 3 && k <= 32;
  return one_tile || short_sums ? kTileVectors - 1 : kTileVectors;
}

// Columns of the next strip of `left` columns. Four vectors are two and two where three are the
// most, since a tile of one needs a load for each multiply-add.
template <class C>
INLINE int64_t next_width(int64_t left, int64_t m, int64_t k) {
  constexpr int64_t L = kLanes<C>;
  const int64_t vectors = kTileVectors == 3 && (left + L - 1) / L == 4 ? 2 : usual_vectors(m, k);
  return left < vectors * L ? left : vectors * L;
}

template <class C>
void block(
    int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, int64_t a_col, bool first,
    const C* b, int64_t b_row, bool in_strips, C* c, int64_t c_row, bool accumulate, bool finish,
    const C* bias, Activation act, Copies<C> copies) {
  constexpr int L = kLanes<C>;
  const bool activates_after = finish && !row_of(act).in_registers;
  for (int64_t j = 0, cols = 0; j < n; j += cols) {
    cols = next_width<C>(n - j, m, k);
    const int tail = static_cast<int>(cols % L);
    const int vectors = static_cast<int>((cols + L - 1) / L);
    // The copy of a is one of tiles of the usual height.
    const int most = tile_rows(copies.a ? usual_vectors(m, k) : vectors);
    const Tile<C>* usual = tiles<C>(vectors, tail != 0);
    const bool reads_a = first && j == 0;
    const bool copies_b = copies.b && tail == 0 && vectors >= kLeastCopied && m > most;
    const C* strip = b + (in_strips ? j * k : j);
    int64_t strip_row = in_strips ? vectors * L : b_row, rows = 0;
    for (int64_t i = 0; i < m; i += rows) {
      rows = next_height(m - i, most);
      const bool below = i + rows < m;
      C* kept = copies.a ? copies.a + i * k : nullptr;
      const bool fills_a = kept && reads_a, fills_b = copies_b && i == 0;
      const Tile<C>* by_rows =
          fills_a || fills_b ? copying_tiles<C>(vectors, fills_a, fills_b) : usual;
      const bool from_kept = kept && !reads_a;
      by_rows[rows - 1](
          k, from_kept ? kept : a + i * a_row, from_kept ? 1 : a_row, from_kept ? rows : a_col,
          reads_a && a_col == 1 && below, strip, strip_row, c + i * c_row + j, c_row,
          kCopies && below, tail, accumulate, finish, bias ? bias + j : nullptr, act,
          {kept, copies.b});
      if (activates_after) {
        activate(rows, cols, c + i * c_row + j, c_row, act);
      }
      if (fills_b) {
        strip = copies.b;
        strip_row = cols;
      }
    }
  }
}
