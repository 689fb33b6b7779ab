// bfloat16 products on AMX: tiles of 16 rows of 64 bytes, multiplied 16 x 16 x 32 at a time.
// Part of kernels-inl.h, whose vectors and activations it uses.
//
// Every sum follows one order: 32 terms of k at a time, from the first, whatever the rows, columns
// and calls: a chain of the even terms, one of the odd, both from zero, and the sum of the two is
// added. So the bits of a row are its own, and few rows take the same instructions as many.

constexpr int kTileEdge = 16;   // rows of a tile; columns of one of float32
constexpr int kTileTerms = 32;  // terms of k in a row of bfloat16

// As LDTILECFG reads it.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tests that compute them in software have defined these (tests/tile_model).
#if !defined(MYLAYERS_TILE_MODEL)
// Statements of our own: g++ 12's intrinsics do not say that they read memory, and the stores of
// what they read may then be removed, or come later.
INLINE void tile_configure(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}
INLINE void tile_release() { asm volatile("tilerelease"); }
template <int kTile>
INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
INLINE void tile_load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
// Memory that is not read again soon.
template <int kTile>
INLINE void tile_load_once(const void* p, int64_t row_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
INLINE void tile_store(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
// sum += a @ b, b of pairs.
template <int kSum, int kA, int kB>
INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}
#endif

// The eight tiles: four of sums, side by side, one of a, and three of b in turn. Two by two would
// load one tile less for every four multiplies, but twice as much of a, which comes from level-2
// cache while a panel of b stays in level 1. [lab: golden-cove]
constexpr int kTileA = 4;
constexpr int kTileB = 5;
constexpr int kAcrossMost = 4;
static_assert(kAcrossMost * kTileEdge == kPanel);

template <int... kIndex, class F>
INLINE void for_constants(std::integer_sequence<int, kIndex...>, F f) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}
// f(0), f(1), ... as constants: the instructions name their tiles.
template <int kCount, class F>
INLINE void for_each_of(F f) {
  for_constants(std::make_integer_sequence<int, kCount>{}, f);
}

// Rows of a, whose last terms of k, where those are no whole tile, lie apart.
struct TileRows {
  const bfloat16_t* data;
  int64_t row;             // from one to the next
  const bfloat16_t* last;  // (rows, kTileTerms), zeros behind the last term; null: none
};

// out (rows, cols) = act(sums + bias) rounded to Out, of sums in rows of `ld_sums`, which are used
// up.
template <class Out>
INLINE void end_sums(
    int64_t rows, int64_t cols, float* sums, int64_t ld_sums, const float* bias, Activation act,
    Out* out, int64_t ld_out) {
  constexpr int L = kLanes<float>;
  const auto finished = [&](const float* row, int64_t j) __attribute__((always_inline)) {
    const vec<float> sum = load(row + j);
    const int64_t left = cols - j;
    const int n = left < L ? static_cast<int>(left) : L;
    const bool adds = bias && n > 0;
    return activate_in_registers<float>(
        adds ? add_in_order<float>(sum, load_n(bias + j, n)) : sum, act);
  };
  if (!row_of(act).in_registers) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; j += L) {
        const vec<float> sum = finished(sums + i * ld_sums, j);
        store(sums + i * ld_sums + j, reads_input(act) ? rounded<Out>(sum) : sum);
      }
    }
    activate(rows, cols, sums, ld_sums, act);
    bias = nullptr;
    act = Activation::kNone;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = sums + i * ld_sums;
    Out* to = out + i * ld_out;
#if defined(MYLAYERS_HAS_AVX512_BF16)
    if constexpr (std::is_same_v<Out, bfloat16_t>) {
      for (int64_t j = 0; j < cols; j += 2 * L) {
        const uint32_t lanes = cols - j < 2 * L ? (1u << (cols - j)) - 1 : ~0u;
        const __m512 second = j + L < cols ? (__m512)finished(row, j + L) : _mm512_setzero_ps();
        _mm512_mask_storeu_epi16(to + j, lanes, two_rounded((__m512)finished(row, j), second));
      }
      continue;
    }
#endif
    for (int64_t j = 0; j < cols; j += L) {
      store_n(to + j, finished(row, j), static_cast<int>(cols - j < L ? cols - j : L));
    }
  }
}

// What a block of rows and columns becomes.
template <class Out>
struct TileResult {
  float* sums;  // with room for whole panels
  int64_t ld_sums;
  bool accumulate;
  const float* bias;  // null: none
  Activation act;
  Out* out;  // null: the sums are kept for the next terms
  int64_t ld_out;
};

// All products of `rows` rows with `panels` panels of b, of kAcross tiles each; `cols` columns in
// all. What a group of tiles has summed is stored when the next one has begun, so that its
// multiplies need not wait.
template <int kAcross, class Out>
void multiply_tiles(
    int64_t rows, int64_t cols, int64_t steps, const TileRows& a, const bfloat16_t* b,
    int64_t panel_size, const TileResult<Out>& result) {
  constexpr int64_t kVnniRow = 2 * kPanel * sizeof(bfloat16_t);
  alignas(64) float finished[kTileEdge][kPanel];
  struct {
    int64_t i = -1, j = 0;  // the group that is still in tiles; -1: none
  } pending;

  const auto store_tile =
      [&]<int t>(std::integral_constant<int, t>) __attribute__((always_inline)) {
        if (result.out) {
          tile_store<t>(finished[0] + t * kTileEdge, sizeof(finished[0]));
        } else {
          tile_store<t>(
              result.sums + pending.i * result.ld_sums + pending.j + t * kTileEdge,
              result.ld_sums * sizeof(float));
        }
      };
  const auto end_group = [&]() __attribute__((always_inline)) {
    if (result.out) {
      const int64_t height = rows - pending.i < kTileEdge ? rows - pending.i : kTileEdge;
      const int64_t width = cols - pending.j < kPanel ? cols - pending.j : kPanel;
      end_sums<Out>(
          height, width, finished[0], kPanel, result.bias ? result.bias + pending.j : nullptr,
          result.act, result.out + pending.i * result.ld_out + pending.j, result.ld_out);
    }
  };

  for (int64_t j = 0; j < cols; j += kPanel) {
    const bfloat16_t* panel = b + j / kPanel * panel_size;
    for (int64_t i = 0; i < rows; i += kTileEdge) {
      const bfloat16_t* b_at = panel;
      // The lines that the next group writes are prefetched, two rows at each step.
      const char* next = reinterpret_cast<const char*>(
          result.out ? static_cast<const void*>(result.out + (i + kTileEdge) * result.ld_out + j)
                     : result.sums + (i + kTileEdge) * result.ld_sums + j);
      const int64_t next_row =
          result.out ? result.ld_out * sizeof(Out) : result.ld_sums * sizeof(float);
      constexpr int64_t kOutBytes = kAcross * kTileEdge * sizeof(Out);
      const int64_t next_bytes = result.out ? kOutBytes : kAcross * kTileEdge * sizeof(float);

      const auto step = [&]<bool kBegins>(
                            std::bool_constant<kBegins>, const bfloat16_t* a_at,
                            int64_t lda) __attribute__((always_inline)) {
        const auto load_b = [&]<int t>(std::integral_constant<int, t>)
                                __attribute__((always_inline)) {
                                  if constexpr (t < kAcross) {
                                    tile_load<kTileB + t % 3>(b_at + 2 * t * kTileEdge, kVnniRow);
                                  }
                                };
        tile_load_once<kTileA>(a_at, lda * sizeof(bfloat16_t));
        load_b(std::integral_constant<int, 0>{});
        load_b(std::integral_constant<int, 1>{});
        for_each_of<kAcross>([&]<int t>(std::integral_constant<int, t> tile)
                                 __attribute__((always_inline)) {
                                   if constexpr (kBegins) {
                                     if (pending.i >= 0) {
                                       store_tile(tile);
                                     }
                                     if (result.accumulate) {
                                       tile_load<t>(
                                           result.sums + i * result.ld_sums + j + t * kTileEdge,
                                           result.ld_sums * sizeof(float));
                                     } else {
                                       tile_zero<t>();
                                     }
                                   }
                                   tile_multiply<t, kTileA, kTileB + t % 3>();
                                   load_b(std::integral_constant<int, t + 2>{});
                                 });
        b_at += kTileTerms * kPanel;
        for (int64_t line = 0; line < next_bytes; line += kLine) {
          __builtin_prefetch(next + line, 1);
          __builtin_prefetch(next + next_row + line, 1);
        }
        next += 2 * next_row;
        if constexpr (kBegins) {
          if (pending.i >= 0) {
            end_group();
          }
          pending = {i, j};
        }
      };

      const bfloat16_t* a_at = a.data + i * a.row;
      const bfloat16_t* last = a.last ? a.last + i * kTileTerms : nullptr;
      if (steps == 0) {
        step(std::true_type{}, last, kTileTerms);
        continue;
      }
      step(std::true_type{}, a_at, a.row);
      for (int64_t s = 1; s < steps; ++s) {
        a_at += kTileTerms;
        step(std::false_type{}, a_at, a.row);
      }
      if (last) {
        step(std::false_type{}, last, kTileTerms);
      }
    }
  }
  for_each_of<kAcross>([&](auto tile) __attribute__((always_inline)) { store_tile(tile); });
  end_group();
}

// Whole panels, then the last one.
template <class Out>
void multiply_panels(
    int64_t rows, int64_t cols, int64_t steps, const TileRows& a, const bfloat16_t* b,
    int64_t panel_size, TileResult<Out> result) {
  const auto multiply = [&]<int kAcross>(std::integral_constant<int, kAcross>, int64_t width) {
    multiply_tiles<kAcross, Out>(rows, width, steps, a, b, panel_size, result);
  };
  const int64_t whole = (cols + kTileEdge - 1) / kPanel * kPanel;
  if (whole > 0) {
    multiply(std::integral_constant<int, kAcrossMost>{}, cols < whole ? cols : whole);
  }
  if (whole >= cols) {
    return;
  }
  b += whole / kPanel * panel_size;
  result.sums += result.sums ? whole : 0;
  result.out += result.out ? whole : 0;
  result.bias += result.bias ? whole : 0;
  const int64_t rest = cols - whole;
  if (rest <= kTileEdge) {
    multiply(std::integral_constant<int, 1>{}, rest);
  } else if (rest <= 2 * kTileEdge) {
    multiply(std::integral_constant<int, 2>{}, rest);
  } else {
    multiply(std::integral_constant<int, 3>{}, rest);
  }
}

// See AmxKernels in kernels.h.
template <class Out>
void amx_macrokernel(
    int64_t m, int64_t cols, int64_t k, const bfloat16_t* a, int64_t lda, const bfloat16_t* last,
    const bfloat16_t* b, int64_t panel_size, float* sums, int64_t ld_sums, bool accumulate,
    const float* bias, Activation act, Out* out, int64_t ld_out) {
  TileRows rows = {a, lda, k % kTileTerms != 0 ? last : nullptr};
  TileResult<Out> result = {sums, ld_sums, accumulate, bias, act, out, ld_out};
  const int64_t steps = k / kTileTerms, whole = m / kTileEdge * kTileEdge, rest = m - whole;
  if (whole > 0) {
    tile_configure(TileShapes{});
    multiply_panels<Out>(whole, cols, steps, rows, b, panel_size, result);
  }
  if (rest > 0) {
    TileShapes shapes;
    for (int t = 0; t <= kTileA; ++t) {
      shapes.rows[t] = static_cast<uint8_t>(rest);
    }
    tile_configure(shapes);
    rows.data += whole * lda;
    rows.last += rows.last ? whole * kTileTerms : 0;
    result.sums += sums ? whole * ld_sums : 0;
    result.out += out ? whole * ld_out : 0;
    multiply_panels<Out>(rest, cols, steps, rows, b, panel_size, result);
  }
  tile_release();
}

// Pairs of bfloat16 in the lanes of a vector: of two rows, the even one below; float32 is rounded.
INLINE vec<float> row_pairs(const bfloat16_t* even, const bfloat16_t* odd) {
  return (vec<float>)(((u32)load(even) >> 16) | (u32)load(odd));
}
INLINE vec<float> row_pairs(vec<float> even, vec<float> odd) {
#if MYLAYERS_LEVEL == 2
  alignas(64) constexpr uint16_t kInTurn[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vec<float>)_mm512_permutexvar_epi16(
      _mm512_load_si512(kInTurn), two_rounded((__m512)even, (__m512)odd));
#else
  return (vec<float>)(widen(bfloat16_bits(even)) | widen(bfloat16_bits(odd)) << 16);
#endif
}
INLINE vec<float> row_pairs(const float* even, const float* odd) {
  return row_pairs(load(even), load(odd));
}

// The same of n terms that follow each other, `stride` apart; zeros behind them.
template <class In>
INLINE vec<float> run_pairs(const In* x, int64_t stride, int64_t n) {
  constexpr int64_t L = kLanes<float>;
  bfloat16_t pairs[2 * L] = {};
  if constexpr (std::is_same_v<In, bfloat16_t>) {
    for (int64_t p = 0; p < n; ++p) {
      pairs[p] = x[p * stride];
    }
  } else {
    const int below = static_cast<int>(n < L ? n : L), above = static_cast<int>(n - below);
    const vec<float> first = load_strided(x, stride, below);
    const vec<float> second =
        above > 0 ? load_strided(x + L * stride, stride, above) : vec<float>{};
#if MYLAYERS_LEVEL == 2
    return (vec<float>)two_rounded((__m512)first, (__m512)second);
#else
    store(pairs, first);
    store(pairs + L, second);
#endif
  }
  return load_bits<vec<float>>(pairs);
}

// A square of 16 columns of 32 terms, `in_row` from one term to the next, as 16 rows of 32 terms.
template <class In>
INLINE void transpose_terms(const In* in, int64_t in_row, bfloat16_t* out, int64_t ld_out) {
  constexpr int L = kLanes<float>;
  UNROLL
  for (int part = 0; part < kTileEdge; part += L) {
    UNROLL
    for (int p = 0; p < kTileEdge; p += L) {
      vec<float> square[L];
      UNROLL
      for (int l = 0; l < L; ++l) {
        const In* even = in + 2 * (p + l) * in_row + part;
        square[l] = row_pairs(even, even + in_row);
      }
      transpose<float>(square);
      UNROLL
      for (int l = 0; l < L; ++l) {
        std::memcpy(out + (part + l) * ld_out + 2 * p, &square[l], sizeof(square[l]));
      }
    }
  }
}

// See AmxKernels in kernels.h.
template <class In>
void amx_copy(
    int64_t rows, int64_t k, const In* in, int64_t in_row, int64_t in_col, bfloat16_t* out,
    int64_t ld_out) {
  constexpr int64_t kRun = 2 * kLanes<float>;
  const int64_t squares = in_row == 1 ? rows / kTileEdge * kTileEdge : 0;
  const int64_t whole = k / kTileTerms * kTileTerms;
  const int64_t filled = (k + kTileTerms - 1) / kTileTerms * kTileTerms;
  for (int64_t i = 0; i < squares; i += kTileEdge) {
    for (int64_t p = 0; p < whole; p += kTileTerms) {
      transpose_terms(in + i + p * in_col, in_col, out + i * ld_out + p, ld_out);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t p = i < squares ? whole : 0; p < filled; p += kRun) {
      const int64_t n = k - p < 0 ? 0 : k - p < kRun ? k - p : kRun;
      const vec<float> pairs = run_pairs(in + i * in_row + p * in_col, in_col, n);
      std::memcpy(out + i * ld_out + p, &pairs, sizeof(pairs));
    }
  }
}

// As pack_vnni, of float32 that is rounded on the way.
void amx_pack_rounded(
    int64_t rows, int64_t cols, const float* in, int64_t in_row, int64_t in_col, bfloat16_t* out,
    int64_t panel_size) {
  constexpr int64_t L = kLanes<float>, kVnniRow = 2 * kPanel, kBand = 4;
  const auto keep = [](bfloat16_t* to, vec<float> pairs) {
    std::memcpy(to, &pairs, sizeof(pairs));
  };
  const int64_t filled = (cols + kTileEdge - 1) / kTileEdge * kTileEdge;
  if (in_row != 1 || in_col == 1) {
    for (int64_t r = 0; r < rows; r += kBand) {
      for (int64_t c = 0; c < filled; c += L) {
        const int n = static_cast<int>(cols - c < 0 ? 0 : cols - c < L ? cols - c : L);
        bfloat16_t* to = out + c / kPanel * panel_size + 2 * (c % kPanel);
        for (int64_t i = r; i < rows && i < r + kBand; i += 2) {
          const float* even = in + i * in_row + c * in_col;
          const bool two = i + 1 < rows;
          prefetch(even, kBand * in_row);
          prefetch(even + in_row, kBand * in_row);
          keep(
              to + i / 2 * kVnniRow,
              row_pairs(
                  load_strided(even, in_col, n),
                  two ? load_strided(even + in_row, in_col, n) : vec<float>{}));
        }
      }
    }
    return;
  }
  for (int64_t c = 0; c < filled; c += L) {
    bfloat16_t* to = out + c / kPanel * panel_size + 2 * (c % kPanel);
    for (int64_t r = 0; r < rows; r += 2 * L) {
      const int64_t n = rows - r < 2 * L ? rows - r : 2 * L;
      vec<float> square[L];
      UNROLL
      for (int64_t l = 0; l < L; ++l) {
        square[l] = c + l < cols ? run_pairs(in + r + (c + l) * in_col, 1, n) : vec<float>{};
      }
      transpose<float>(square);
      for (int64_t l = 0; l < L && 2 * l < n; ++l) {
        keep(to + (r / 2 + l) * kVnniRow, square[l]);
      }
    }
  }
}

constexpr AmxKernels kAmx = {
    amx_copy<bfloat16_t>, amx_copy<float>, amx_pack_rounded, amx_macrokernel<bfloat16_t>,
    amx_macrokernel<float>};
