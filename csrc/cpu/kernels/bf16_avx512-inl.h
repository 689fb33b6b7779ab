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

// As microkernel, of pairs of terms: a panel of b as pack_vnni makes it, sums in rows of kPanel.
// The last call of a sum that writes out rounds it to bfloat16.
template <int kRows, int kVectors>
void vnni_microkernel(
    int64_t pairs, const bfloat16_t* a, int64_t lda, bool more_rows, const bfloat16_t* b,
    float* sums, bool accumulate, int64_t cols, const bfloat16_t* bias, Activation act,
    bfloat16_t* out, int64_t ld_out) {
  constexpr int L = kLanes<float>;
  NextRows<kRows> next_rows(a, lda * static_cast<int64_t>(sizeof(bfloat16_t)));
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
      next_rows.prefetch();
    }
    __m512i row[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      row[v] = _mm512_loadu_si512(b + 2 * v * L);
    }
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512i x = _mm512_set1_epi32(load_bits<int>(a + i * lda));
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
      sum[i][v] = (__m512)activate_in_registers<float>(bias ? total + add : total, act);
    }
  }
  UNROLL
  for (int v = 0; v < kVectors; v += 2) {
    const int64_t left = cols - v * L;
    const uint32_t lanes = left < 2 * L ? (1u << left) - 1 : ~0u;
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512 second = v + 1 < kVectors ? sum[i][v + 1] : _mm512_setzero_ps();
      _mm512_mask_storeu_epi16(out + i * ld_out + v * L, lanes, two_rounded(sum[i][v], second));
    }
  }
}

template <int kVectors>
void vnni_panel(
    int64_t m, int64_t cols, int64_t pairs, const bfloat16_t* a, int64_t lda, bool first_panel,
    const bfloat16_t* b, float* sums, bool accumulate, const bfloat16_t* bias, Activation act,
    bfloat16_t* out, int64_t ld_out) {
  constexpr decltype(&vnni_microkernel<1, kVectors>) by_rows[kMr] = {
      vnni_microkernel<1, kVectors>, vnni_microkernel<2, kVectors>, vnni_microkernel<3, kVectors>,
      vnni_microkernel<4, kVectors>, vnni_microkernel<5, kVectors>, vnni_microkernel<6, kVectors>};
  int64_t rows = 0;
  for (int64_t i = 0; i < m; i += rows) {
    rows = next_height(m - i, kMr);
    by_rows[rows - 1](
        pairs, a + i * lda, lda, first_panel && i + rows < m, b, sums + i * kPanel, accumulate,
        cols, bias, act, out ? out + i * ld_out : nullptr, ld_out);
  }
}

void vnni_macrokernel(
    int64_t m, int64_t cols, int64_t pairs, const bfloat16_t* a, int64_t lda, bool first_panel,
    const bfloat16_t* b, float* sums, bool accumulate, const bfloat16_t* bias, Activation act,
    bfloat16_t* out, int64_t ld_out) {
  constexpr decltype(&vnni_panel<1>) by_vectors[kNrVectors] = {
      vnni_panel<1>, vnni_panel<2>, vnni_panel<3>, vnni_panel<4>};
  by_vectors[(cols - 1) / kLanes<float>](
      m, cols, pairs, a, lda, first_panel, b, sums, accumulate, bias, act, out, ld_out);
}

// The pairs of two rows, of the first of 32 columns and of the others; zeros where a mask has none.
INLINE void load_pairs(
    __m512bh (&pairs)[2], const bfloat16_t* even, int64_t ldb, uint32_t in_even, uint32_t in_odd) {
  const __m512i top = _mm512_maskz_loadu_epi16(in_even, even);
  const __m512i bottom = _mm512_maskz_loadu_epi16(in_odd, even + ldb);
  UNROLL
  for (int h = 0; h < 2; ++h) {
    pairs[h] = (__m512bh)in_register(interleave(top, bottom, h));
  }
}

// One pass of vnni_skinny: c (kRows, n) = c0 + a (kRows, 2 * kPairs) @ b (2 * kPairs, n), whose
// last row may be missing.
template <int kRows, int kPairs>
void vnni_skinny_pass(
    int64_t n, const bfloat16_t* a, int64_t lda, const bfloat16_t* b, int64_t ldb, bool whole,
    Residency residency, float* c, int64_t ldc, bool accumulate) {
  __m512bh x[kRows][kPairs];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int s = 0; s < kPairs; ++s) {
      x[i][s] = (__m512bh)_mm512_set1_epi32(load_bits<int>(a + i * lda + 2 * s));
    }
  }
  for (int64_t j = 0; j < n; j += 32) {
    const uint32_t columns = n - j < 32 ? (1u << (n - j)) - 1 : ~0u;
    const __mmask16 halves[2] = {
        static_cast<__mmask16>(columns), static_cast<__mmask16>(columns >> 16)};
    if (residency == Residency::kMemoryByLevel2) {
      prefetch_next_rows<2 * kPairs, 2>(b + j, ldb);
    }
    __m512 sum[kRows][2];
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      UNROLL
      for (int h = 0; h < 2; ++h) {
        sum[i][h] = accumulate ? _mm512_maskz_loadu_ps(halves[h], c + i * ldc + j + 16 * h)
                               : _mm512_setzero_ps();
      }
    }
    UNROLL
    for (int s = 0; s < kPairs; ++s) {
      __m512bh pairs[2];
      load_pairs(pairs, b + 2 * s * ldb + j, ldb, columns, s + 1 < kPairs || whole ? columns : 0);
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
        _mm512_mask_storeu_ps(c + i * ldc + j + 16 * h, halves[h], sum[i][h]);
      }
    }
  }
}

template <int kRows>
void vnni_skinny_rows(
    int64_t n, int64_t k, const bfloat16_t* a, int64_t lda, const bfloat16_t* b, int64_t ldb,
    Residency residency, float* c, int64_t ldc) {
  constexpr int kMost = kSkinnyTerms / 2;
  constexpr decltype(&vnni_skinny_pass<kRows, 1>) by_pairs[kMost] = {
      vnni_skinny_pass<kRows, 1>, vnni_skinny_pass<kRows, 2>, vnni_skinny_pass<kRows, 3>,
      vnni_skinny_pass<kRows, 4>};
  for (int64_t p = 0; p < k; p += 2 * kMost) {
    const int64_t steps = k - p < 2 * kMost ? k - p : 2 * kMost;
    by_pairs[(steps + 1) / 2 - 1](
        n, a + p, lda, b + p * ldb, ldb, steps % 2 == 0, residency, c, ldc, p > 0);
  }
}

void vnni_skinny(
    int64_t m, int64_t n, int64_t k, const bfloat16_t* a, int64_t lda, const bfloat16_t* b,
    int64_t ldb, Residency residency, float* c, int64_t ldc) {
  constexpr decltype(&vnni_skinny_rows<1>) by_rows[kSkinnyRows] = {
      vnni_skinny_rows<1>, vnni_skinny_rows<2>, vnni_skinny_rows<3>, vnni_skinny_rows<4>};
  by_rows[m - 1](n, k, a, lda, b, ldb, residency, c, ldc);
}

// As add_products, of pairs, for 32 columns less those that a mask leaves out.
template <int kRows, int kPairs>
INLINE void add_vnni_products(
    const bfloat16_t* a, int64_t lda, const __m512bh (&pairs)[kPairs][2], float* sums,
    int64_t ld_sums, bool accumulate, const __mmask16 (&halves)[2]) {
  __m512 sum[kRows][2];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
      sum[i][h] = accumulate ? _mm512_maskz_loadu_ps(halves[h], sums + i * ld_sums + 16 * h)
                             : _mm512_setzero_ps();
    }
  }
  UNROLL
  for (int s = 0; s < kPairs; ++s) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512i x = _mm512_set1_epi32(load_bits<int>(a + i * lda + 2 * s));
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
      _mm512_mask_storeu_ps(sums + i * ld_sums + 16 * h, halves[h], sum[i][h]);
    }
  }
}

// One pass of vnni_skinny_many, to sums (m, n), over 2 * kPairs rows of b, whose last may be
// missing.
template <int kPairs>
void vnni_skinny_many_pass(
    int64_t m, int64_t n, const bfloat16_t* a, int64_t lda, const bfloat16_t* b, int64_t ldb,
    bool whole, Residency residency, float* sums, int64_t ld_sums, bool accumulate) {
  for (int64_t j = 0; j < n; j += 32) {
    const uint32_t columns = n - j < 32 ? (1u << (n - j)) - 1 : ~0u;
    const __mmask16 halves[2] = {
        static_cast<__mmask16>(columns), static_cast<__mmask16>(columns >> 16)};
    __m512bh pairs[kPairs][2];
    UNROLL
    for (int s = 0; s < kPairs; ++s) {
      load_pairs(
          pairs[s], b + 2 * s * ldb + j, ldb, columns, s + 1 < kPairs || whole ? columns : 0);
    }
    if (residency == Residency::kMemoryByLevel2) {
      prefetch_next_rows<2 * kPairs, 2>(b + j, ldb);
    } else if (residency == Residency::kMemory) {
      prefetch_next_rows<2 * kPairs, 2, 1>(b + j, ldb);
    }
    int64_t i = 0;
    for (; i + 2 <= m; i += 2) {
      add_vnni_products<2>(
          a + i * lda, lda, pairs, sums + i * ld_sums + j, ld_sums, accumulate, halves);
    }
    if (i < m) {
      add_vnni_products<1>(
          a + i * lda, lda, pairs, sums + i * ld_sums + j, ld_sums, accumulate, halves);
    }
  }
}

// Sixteen rows of b at a time, twice those of skinny_many, since a multiply-add takes two. Of
// memory the prefetcher alone does not follow so many, so the next rows are prefetched; not from a
// cache, where that costs time. [lab: constants]
void vnni_skinny_many(
    int64_t m, int64_t n, int64_t k, const bfloat16_t* a, int64_t lda, const bfloat16_t* b,
    int64_t ldb, Residency residency, float* sums, int64_t ld_sums) {
  constexpr auto passes = []<int... kPair>(std::integer_sequence<int, kPair...>) {
    return std::array{vnni_skinny_many_pass<kPair + 1>...};
  }(std::make_integer_sequence<int, kSkinnyTerms>{});
  constexpr int64_t kMost = 2 * kSkinnyTerms;
  for (int64_t p = 0; p < k; p += kMost) {
    const int64_t steps = k - p < kMost ? k - p : kMost;
    passes[(steps + 1) / 2 - 1](
        m, n, a + p, lda, b + p * ldb, ldb, steps % 2 == 0,
        k - p > kMost ? residency : Residency::kCache, sums, ld_sums, p > 0);
  }
}
