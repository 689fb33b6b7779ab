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
    int64_t ld_out) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  if (in_col == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      Out* to = out + i * ld_out;
      const T* from = in + i * in_row;
      for_vectors<C>(cols, BODY { store_n(to + j, load_n(from + j, n), n); });
      for (int64_t z = cols; z < ld_out; ++z) {
        to[z] = Out{};
      }
    }
    return;
  }
  for (int64_t c = 0; c < ld_out; c += L) {
    const int width = static_cast<int>(ld_out - c < L ? ld_out - c : L);
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
          store(out + (r + l) * ld_out + c, square[l]);
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
          store_n(out + (r + l) * ld_out + c, square[l], width);
        }
      }
    }
  }
}

template <class T>
void pack_micropanels(
    int64_t rows, int64_t cols, const T* in, int64_t in_row, int64_t in_col, int64_t m,
    acc_t<T>* out) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  const auto pack_all =
      [&]<int kVectors>(std::integral_constant<int, kVectors>) __attribute__((always_inline)) {
        constexpr int64_t kNr = kVectors * L;
        int64_t whole = 0;
        while (next_width<C>(cols - whole, m, rows) == kNr) {
          whole += kNr;
        }
        if (in_col != 1) {
          for (int64_t j = 0; j < whole; j += kNr) {
            pack<T, C>(rows, kNr, in + j * in_col, in_row, in_col, out + j * rows, kNr);
          }
          return whole;
        }
        for (int64_t i = 0; i < rows; ++i) {  // all at once: memory is read in longer runs
          for (int64_t j = 0; j < whole; j += kNr) {
            UNROLL
            for (int v = 0; v < kVectors; ++v) {
              store(out + j * rows + i * kNr + v * L, load(in + i * in_row + j + v * L));
            }
          }
        }
        return whole;
      };
  const int64_t whole = usual_vectors(m, rows) == kNrVectors
                            ? pack_all(std::integral_constant<int, kNrVectors>{})
                            : pack_all(std::integral_constant<int, kNrVectors - 1>{});
  for (int64_t j = whole, width = 0; j < cols; j += width) {
    width = next_width<C>(cols - j, m, rows);
    pack<T, C>(
        rows, width, in + j * in_col, in_row, in_col, out + j * rows, (width + L - 1) / L * L);
  }
}
