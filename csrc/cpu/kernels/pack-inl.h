// Copies of operands, in the order in which microkernels read them.

template <class T>
INLINE acc_t<T> widen(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return load_part(p, 1)[0];
  } else {
    return load_bits<T>(p);
  }
}

// Out is T (a plain copy) or acc_t<T>.
template <class T, class Out>
void pack(
    int64_t rows, int64_t cols, const T* in, int64_t in_row, int64_t in_col, Out* out,
    int64_t out_row) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  if (in_col == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      Out* to = out + i * out_row;
      const T* from = in + i * in_row;
      for_vectors<C>(cols, BODY { store_n(to + j, load_n(from + j, n), n); });
      for (int64_t z = cols; z < out_row; ++z) {
        to[z] = Out{};
      }
    }
    return;
  }
  for (int64_t c = 0; c < out_row; c += L) {
    const int width = static_cast<int>(out_row - c < L ? out_row - c : L);
    for (int64_t r = 0; r < rows; r += L) {
      const int height = static_cast<int>(rows - r < L ? rows - r : L);
      vec<C> square[L];
      if (in_row == 1 && height == L && c + L <= cols) {  // whole, in one piece without branches
        const auto column = [&](int l) { return in + r + (c + l) * in_col; };
        if constexpr (std::is_same_v<T, C>) {
          load_transposed<C>(square, column);
        } else {
          UNROLL
          for (int l = 0; l < L; ++l) {
            square[l] = load(column(l));
          }
          transpose<C>(square);
        }
        UNROLL
        for (int l = 0; l < L; ++l) {
          store(out + (r + l) * out_row + c, square[l]);
        }
        continue;
      }
      UNROLL
      for (int l = 0; l < L; ++l) {
        const T* from = in + r * in_row + (c + l) * in_col;
        square[l] = c + l >= cols ? vec<C>{} : load_strided(from, in_row, height);
      }
      transpose<C>(square);
      UNROLL
      for (int l = 0; l < L; ++l) {
        if (l < height) {
          store_n(out + (r + l) * out_row + c, square[l], width);
        }
      }
    }
  }
}

template <class T>
void pack_strips(
    int64_t rows, int64_t cols, const T* in, int64_t in_row, int64_t in_col, int64_t m,
    acc_t<T>* out) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  const auto pack_all =
      [&]<int kVectors>(std::integral_constant<int, kVectors>) __attribute__((always_inline)) {
        constexpr int64_t kStrip = kVectors * L;
        int64_t whole = 0;
        while (next_width<C>(cols - whole, m, rows) == kStrip) {
          whole += kStrip;
        }
        if (in_col != 1) {
          for (int64_t j = 0; j < whole; j += kStrip) {
            pack<T, C>(rows, kStrip, in + j * in_col, in_row, in_col, out + j * rows, kStrip);
          }
          return whole;
        }
        for (int64_t i = 0; i < rows; ++i) {  // all at once: memory is read in longer runs
          for (int64_t j = 0; j < whole; j += kStrip) {
            UNROLL
            for (int v = 0; v < kVectors; ++v) {
              store(out + j * rows + i * kStrip + v * L, load(in + i * in_row + j + v * L));
            }
          }
        }
        return whole;
      };
  const int64_t whole = usual_vectors(m, rows) == kTileVectors
                            ? pack_all(std::integral_constant<int, kTileVectors>{})
                            : pack_all(std::integral_constant<int, kTileVectors - 1>{});
  for (int64_t j = whole, width = 0; j < cols; j += width) {
    width = next_width<C>(cols - j, m, rows);
    pack<T, C>(
        rows, width, in + j * in_col, in_row, in_col, out + j * rows, (width + L - 1) / L * L);
  }
}
