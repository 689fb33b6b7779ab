// Products of pairs by AVX512-BF16.

// bfloat16_bits of two vectors, by the processor's own conversion where it agrees: it takes
// subnormal numbers for zero and keeps the sign and payload of a NaN.
INLINE __m512i two_rounded(__m512 first, __m512 second) {
  constexpr int kNaNOrSubnormal = 0x01 | 0x20 | 0x80;  // quiet NaN, subnormal, signalling NaN
  const __mmask16 other = _mm512_fpclass_ps_mask(first, kNaNOrSubnormal) |
                          _mm512_fpclass_ps_mask(second, kNaNOrSubnormal);
  if (__builtin_expect(other != 0, false)) {
    return _mm512_inserti64x4(
        _mm512_castsi256_si512((__m256i)bfloat16_bits((vec<float>)first)),
        (__m256i)bfloat16_bits((vec<float>)second), 1);
  }
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

// As tile, of pairs: a panel of b as pack_pairs makes it, sums in rows of kPanel. The last call of
// a sum that writes out rounds it to bfloat16.
template <int kRows, int kVectors>
void pair_tile(
    int64_t pairs, const bfloat16_t* a, int64_t a_row, bool more_rows, const bfloat16_t* b,
    float* sums, bool accumulate, int64_t cols, const bfloat16_t* bias, Activation act,
    bfloat16_t* out, int64_t out_row) {
  constexpr int L = kLanes<float>;
  RowsBelow<kRows> below(a, a_row * static_cast<int64_t>(sizeof(bfloat16_t)));
  __m512 sum[kRows][kVectors];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = accumulate ? _mm512_loadu_ps(sums + i * kPanel + v * L) : _mm512_setzero_ps();
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    if (more_rows) {
      below.ask();
    }
    __m512i row[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      row[v] = _mm512_loadu_si512(b + 2 * v * L);
    }
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512i x = _mm512_set1_epi32(load_bits<int>(a + i * a_row));
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)x, (__m512bh)row[v]);
      }
    }
    a += 2;
    b += 2 * kPanel;
  }
  if (!out) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        _mm512_storeu_ps(sums + i * kPanel + v * L, sum[i][v]);
      }
    }
    return;
  }
  UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const int n = static_cast<int>(cols - v * L < L ? cols - v * L : L);
    const vec<float> add = bias ? load_n(bias + v * L, n) : vec<float>{};
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const vec<float> total = (vec<float>)sum[i][v];
      sum[i][v] = (__m512)activate_in_tile<float>(bias ? total + add : total, act);
    }
  }
  UNROLL
  for (int v = 0; v < kVectors; v += 2) {
    const int64_t left = cols - v * L;
    const uint32_t lanes = left < 2 * L ? (1u << left) - 1 : ~0u;
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512 second = v + 1 < kVectors ? sum[i][v + 1] : _mm512_setzero_ps();
      _mm512_mask_storeu_epi16(out + i * out_row + v * L, lanes, two_rounded(sum[i][v], second));
    }
  }
}

template <int kVectors>
void pair_panel(
    int64_t m, int64_t cols, int64_t pairs, const bfloat16_t* a, int64_t a_row, bool first_panel,
    const bfloat16_t* b, float* sums, bool accumulate, const bfloat16_t* bias, Activation act,
    bfloat16_t* out, int64_t out_row) {
  constexpr decltype(&pair_tile<1, kVectors>) by_rows[kTileRows] = {
      pair_tile<1, kVectors>, pair_tile<2, kVectors>, pair_tile<3, kVectors>,
      pair_tile<4, kVectors>, pair_tile<5, kVectors>, pair_tile<6, kVectors>};
  int64_t rows = 0;
  for (int64_t i = 0; i < m; i += rows) {
    rows = next_height(m - i, kTileRows);
    by_rows[rows - 1](
        pairs, a + i * a_row, a_row, first_panel && i + rows < m, b, sums + i * kPanel, accumulate,
        cols, bias, act, out ? out + i * out_row : nullptr, out_row);
  }
}

void pair_block(
    int64_t m, int64_t cols, int64_t pairs, const bfloat16_t* a, int64_t a_row, bool first_panel,
    const bfloat16_t* b, float* sums, bool accumulate, const bfloat16_t* bias, Activation act,
    bfloat16_t* out, int64_t out_row) {
  constexpr decltype(&pair_panel<1>) by_vectors[kTileVectors] = {
      pair_panel<1>, pair_panel<2>, pair_panel<3>, pair_panel<4>};
  by_vectors[(cols - 1) / kLanes<float>](
      m, cols, pairs, a, a_row, first_panel, b, sums, accumulate, bias, act, out, out_row);
}

// The pairs of two rows, of the first of 32 columns and of the others; zeros where a mask has none.
INLINE void load_pairs(
    __m512bh (&pairs)[2], const bfloat16_t* even, int64_t b_row, uint32_t in_even,
    uint32_t in_odd) {
  const __m512i top = _mm512_maskz_loadu_epi16(in_even, even);
  const __m512i bottom = _mm512_maskz_loadu_epi16(in_odd, even + b_row);
  UNROLL
  for (int h = 0; h < 2; ++h) {
    pairs[h] = (__m512bh)in_register(interleave(top, bottom, h));
  }
}

// One pass of pair_stream: c (kRows, n) = c0 + a (kRows, 2 * kPairs) @ b (2 * kPairs, n), whose
// last row may be missing.
template <int kRows, int kPairs>
void pair_stream_pass(
    int64_t n, const bfloat16_t* a, int64_t a_row, const bfloat16_t* b, int64_t b_row, bool whole,
    Source source, float* c, int64_t c_row, bool accumulate) {
  __m512bh x[kRows][kPairs];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int s = 0; s < kPairs; ++s) {
      x[i][s] = (__m512bh)_mm512_set1_epi32(load_bits<int>(a + i * a_row + 2 * s));
    }
  }
  for (int64_t j = 0; j < n; j += 32) {
    const uint32_t columns = n - j < 32 ? (1u << (n - j)) - 1 : ~0u;
    const __mmask16 halves[2] = {
        static_cast<__mmask16>(columns), static_cast<__mmask16>(columns >> 16)};
    if (source == Source::kMemoryByLevel2) {
      prefetch_rows_below<2 * kPairs, 2>(b + j, b_row);
    }
    __m512 sum[kRows][2];
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      UNROLL
      for (int h = 0; h < 2; ++h) {
        sum[i][h] = accumulate ? _mm512_maskz_loadu_ps(halves[h], c + i * c_row + j + 16 * h)
                               : _mm512_setzero_ps();
      }
    }
    UNROLL
    for (int s = 0; s < kPairs; ++s) {
      __m512bh pairs[2];
      load_pairs(
          pairs, b + 2 * s * b_row + j, b_row, columns, s + 1 < kPairs || whole ? columns : 0);
      UNROLL
      for (int h = 0; h < 2; ++h) {
        UNROLL
        for (int i = 0; i < kRows; ++i) {
          sum[i][h] = _mm512_dpbf16_ps(sum[i][h], x[i][s], pairs[h]);
        }
      }
    }
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      UNROLL
      for (int h = 0; h < 2; ++h) {
        _mm512_mask_storeu_ps(c + i * c_row + j + 16 * h, halves[h], sum[i][h]);
      }
    }
  }
}

template <int kRows>
void pair_stream_rows(
    int64_t n, int64_t k, const bfloat16_t* a, int64_t a_row, const bfloat16_t* b, int64_t b_row,
    Source source, float* c, int64_t c_row) {
  constexpr int kMost = kStreamDepth / 2;
  constexpr decltype(&pair_stream_pass<kRows, 1>) by_pairs[kMost] = {
      pair_stream_pass<kRows, 1>, pair_stream_pass<kRows, 2>, pair_stream_pass<kRows, 3>,
      pair_stream_pass<kRows, 4>};
  for (int64_t p = 0; p < k; p += 2 * kMost) {
    const int64_t steps = k - p < 2 * kMost ? k - p : 2 * kMost;
    by_pairs[(steps + 1) / 2 - 1](
        n, a + p, a_row, b + p * b_row, b_row, steps % 2 == 0, source, c, c_row, p > 0);
  }
}

void pair_stream(
    int64_t m, int64_t n, int64_t k, const bfloat16_t* a, int64_t a_row, const bfloat16_t* b,
    int64_t b_row, Source source, float* c, int64_t c_row) {
  constexpr decltype(&pair_stream_rows<1>) by_rows[kStreamRows] = {
      pair_stream_rows<1>, pair_stream_rows<2>, pair_stream_rows<3>, pair_stream_rows<4>};
  by_rows[m - 1](n, k, a, a_row, b, b_row, source, c, c_row);
}

// As add_products, of pairs, for 32 columns less those that a mask leaves out.
template <int kRows, int kPairs>
INLINE void add_pairs(
    const bfloat16_t* a, int64_t a_row, const __m512bh (&pairs)[kPairs][2], float* sums,
    int64_t sums_row, bool accumulate, const __mmask16 (&halves)[2]) {
  __m512 sum[kRows][2];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
      sum[i][h] = accumulate ? _mm512_maskz_loadu_ps(halves[h], sums + i * sums_row + 16 * h)
                             : _mm512_setzero_ps();
    }
  }
  UNROLL
  for (int s = 0; s < kPairs; ++s) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512i x = _mm512_set1_epi32(load_bits<int>(a + i * a_row + 2 * s));
      UNROLL
      for (int h = 0; h < 2; ++h) {
        sum[i][h] = _mm512_dpbf16_ps(sum[i][h], (__m512bh)x, pairs[s][h]);
      }
    }
  }
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
      _mm512_mask_storeu_ps(sums + i * sums_row + 16 * h, halves[h], sum[i][h]);
    }
  }
}

// One pass of pair_stream_many, to sums (m, n), over 2 * kPairs rows of b, whose last may be
// missing.
template <int kPairs>
void pair_stream_many_pass(
    int64_t m, int64_t n, const bfloat16_t* a, int64_t a_row, const bfloat16_t* b, int64_t b_row,
    bool whole, Source source, float* sums, int64_t sums_row, bool accumulate) {
  for (int64_t j = 0; j < n; j += 32) {
    const uint32_t columns = n - j < 32 ? (1u << (n - j)) - 1 : ~0u;
    const __mmask16 halves[2] = {
        static_cast<__mmask16>(columns), static_cast<__mmask16>(columns >> 16)};
    __m512bh pairs[kPairs][2];
    UNROLL
    for (int s = 0; s < kPairs; ++s) {
      load_pairs(
          pairs[s], b + 2 * s * b_row + j, b_row, columns, s + 1 < kPairs || whole ? columns : 0);
    }
    if (source == Source::kMemoryByLevel2) {
      prefetch_rows_below<2 * kPairs, 2>(b + j, b_row);
    } else if (source == Source::kMemory) {
      prefetch_rows_below<2 * kPairs, 2, 1>(b + j, b_row);
    }
    int64_t i = 0;
    for (; i + 2 <= m; i += 2) {
      add_pairs<2>(
          a + i * a_row, a_row, pairs, sums + i * sums_row + j, sums_row, accumulate, halves);
    }
    if (i < m) {
      add_pairs<1>(
          a + i * a_row, a_row, pairs, sums + i * sums_row + j, sums_row, accumulate, halves);
    }
  }
}

// Sixteen rows of b at a time, twice those of stream_many, since a multiply-add takes two. Of
// memory the prefetcher alone does not follow so many: 16 x 4096 x 4096 took 2.6 to 4.5 ms, and 1.9
// with the rows below asked for, which costs a tenth where a cache holds them.
void pair_stream_many(
    int64_t m, int64_t n, int64_t k, const bfloat16_t* a, int64_t a_row, const bfloat16_t* b,
    int64_t b_row, Source source, float* sums, int64_t sums_row) {
  constexpr auto passes = []<int... kPair>(std::integer_sequence<int, kPair...>) {
    return std::array{pair_stream_many_pass<kPair + 1>...};
  }(std::make_integer_sequence<int, kStreamDepth>{});
  constexpr int64_t kMost = 2 * kStreamDepth;
  for (int64_t p = 0; p < k; p += kMost) {
    const int64_t steps = k - p < kMost ? k - p : kMost;
    passes[(steps + 1) / 2 - 1](
        m, n, a + p, a_row, b + p * b_row, b_row, steps % 2 == 0,
        k - p > kMost ? source : Source::kCache, sums, sums_row, p > 0);
  }
}
