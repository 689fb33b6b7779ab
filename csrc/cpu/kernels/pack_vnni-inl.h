// Pairs of rows of b side by side (the VNNI layout), for 16-bit dot products.

// Pairs (even[c], odd[c]), the first n of kLanes columns; zeros for an odd that is null.
INLINE void store_pairs(
    bfloat16_t* out, const bfloat16_t* even, const bfloat16_t* odd, int64_t stride, int n) {
  const vec<float> x = load_strided(even, stride, n);
  const vec<float> y = odd ? load_strided(odd, stride, n) : vec<float>{};
  const u32 pairs = ((u32)x >> 16) | (u32)y;
  std::memcpy(out, &pairs, sizeof(pairs));
}

// Columns from `first` to `width` of one row of pairs, and zeros up to a multiple of 16.
INLINE void pack_vnni_row(
    const bfloat16_t* even, const bfloat16_t* odd, int64_t stride, int64_t first, int64_t width,
    bfloat16_t* pairs) {
  constexpr int L = kLanes<float>;
  for (int64_t j = first; j < (width + 15) / 16 * 16; j += L) {
    const int n = static_cast<int>(width - j < 0 ? 0 : width - j < L ? width - j : L);
    const int64_t at = j * stride;
    store_pairs(pairs + 2 * j, even + at, odd ? odd + at : nullptr, stride, n);
  }
}

#if !defined(MYLAYERS_HAS_PACK_WHOLE_VNNI_ROW)
// The same of a whole panel with unit stride.
INLINE void pack_whole_vnni_row(const bfloat16_t* even, const bfloat16_t* odd, bfloat16_t* pairs) {
  UNROLL
  for (int64_t j = 0; j < kPanel; j += kLanes<float>) {
    store_pairs(pairs + 2 * j, even + j, odd + j, 1, kLanes<float>);
  }
}
#endif

// Two rows of b side by side, as the processor's 16-bit multiply-adds want them. Memory is read in
// long runs, four whole rows at a time or whole columns, the next rows being prefetched meanwhile.
// [lab: constants]
void pack_vnni(
    int64_t rows, int64_t cols, const bfloat16_t* in, int64_t in_row, int64_t in_col,
    bfloat16_t* out, int64_t panel_size) {
  constexpr int L = kLanes<float>;
  constexpr int64_t ld_out = 2 * kPanel, kBand = 4;
  if (in_row != 1 || in_col == 1) {
    for (int64_t r = 0; r < rows; r += kBand) {
      for (int64_t c = 0; c < cols; c += kPanel) {
        const int64_t width = cols - c < kPanel ? cols - c : kPanel;
        bfloat16_t* panel = out + c / kPanel * panel_size;
        for (int64_t i = r; i < rows && i < r + kBand; i += 2) {
          const bfloat16_t* even = in + i * in_row + c * in_col;
          const bfloat16_t* odd = i + 1 < rows ? even + in_row : nullptr;
          bfloat16_t* pairs = panel + i / 2 * ld_out;
          if (in_col == 1 && odd && width == kPanel) {
            UNROLL
            for (int64_t j = 0; j < kPanel; j += 32) {
              prefetch(even + j, kBand * in_row);
              prefetch(odd + j, kBand * in_row);
            }
            pack_whole_vnni_row(even, odd, pairs);
          } else {
            pack_vnni_row(even, odd, in_col, 0, width, pairs);
          }
        }
      }
    }
    return;
  }
  const int64_t whole = rows / (2 * L) * (2 * L);
  for (int64_t c = 0; c < cols; c += kPanel) {
    const int64_t width = cols - c < kPanel ? cols - c : kPanel, squares = width / L * L;
    const bfloat16_t* from = in + c * in_col;
    bfloat16_t* to = out + c / kPanel * panel_size;
    // Pairs lie side by side already, down the columns: transpose them as 32-bit units.
    for (int64_t j = 0; j < squares; j += L) {
      for (int64_t r = 0; r < whole; r += 2 * L) {
        vec<float> square[L];
        load_transposed<float>(square, [&](int l) {
          return reinterpret_cast<const float*>(from + r + (j + l) * in_col);
        });
        UNROLL
        for (int l = 0; l < L; ++l) {
          std::memcpy(to + (r / 2 + l) * ld_out + 2 * j, &square[l], sizeof(square[l]));
        }
      }
    }
    for (int64_t r = squares == kPanel ? whole : 0; r < rows; r += 2) {
      pack_vnni_row(
          from + r, r + 1 < rows ? from + r + 1 : nullptr, in_col, r < whole ? squares : 0, width,
          to + r / 2 * ld_out);
    }
  }
}
