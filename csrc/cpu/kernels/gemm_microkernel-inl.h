// The microkernel: MR x NR of c in registers, over the terms of one call.

// What a microkernel copies of what it reads, so that others find it in the order of their steps.
// That costs it a store or two a step: less than a copy made beforehand. [lab: constants]
enum Copying { kNothing, kA, kB, kBoth };

// kRows x (kVectors * kLanes) of c, the last vector cut to `tail` lanes if kTail. `prefetches_a`,
// `prefetches_c`: more rows of them follow, and are prefetched.
template <class C, int kRows, int kVectors, bool kTail, Copying kCopying>
void microkernel(
    int64_t k, const C* a, int64_t lda, int64_t a_col, bool prefetches_a, const C* b, int64_t ldb,
    C* c, int64_t ldc, bool prefetches_c, int tail, bool accumulate, bool epilogue, const C* bias,
    Activation act, PackBuffers<C> buffers) {
  constexpr int L = kLanes<C>;
  NextRows<kRows> next_rows(a, lda * static_cast<int64_t>(sizeof(C)));
  const auto get = [&](const C* p, int v) __attribute__((always_inline)) {
    return kTail && v == kVectors - 1 ? load_part(p + v * L, tail) : load(p + v * L);
  };
  vec<C> sum[kRows][kVectors];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = accumulate ? get(c + i * ldc, v) : vec<C>{};
    }
  }
  if (prefetches_c) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      prefetch_row<kVectors>(c, (kRows + i) * ldc);
    }
  }
  _Pragma("GCC unroll kUnroll") for (int64_t p = 0; p < k; ++p) {
    if (prefetches_a) {
      next_rows.prefetch();
    }
    vec<C> row[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      row[v] = get(b, v);
      if constexpr (kRows > 1) {  // used again
        row[v] = in_register(row[v]);
      }
      if constexpr ((kCopying & kB) != 0) {
        store(buffers.b + v * L, row[v]);
      }
    }
    if constexpr ((kCopying & kB) != 0) {
      prefetch_row<kVectors>(b, kAhead * ldb);
      buffers.b += kVectors * L;
    }
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const C x = load_bits<C>(a + i * lda);
      if constexpr ((kCopying & kA) != 0) {
        buffers.a[i] = x;
      }
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = multiply_add<C>(splat(x), row[v], sum[i][v]);
      }
    }
    if constexpr ((kCopying & kA) != 0) {
      buffers.a += kRows;
    }
    a += a_col;
    b += ldb;
  }
  if (epilogue) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const vec<C> add = bias ? get(bias, v) : vec<C>{};
      UNROLL
      for (int i = 0; i < kRows; ++i) {
        sum[i][v] =
            activate_in_registers<C>(bias ? add_in_order<C>(sum[i][v], add) : sum[i][v], act);
      }
    }
  }
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      C* out = c + i * ldc + v * L;
      if (kTail && v == kVectors - 1) {
        store_part(out, sum[i][v], tail);
      } else {
        store(out, sum[i][v]);
      }
    }
  }
}

template <class C>
using Microkernel = void (*)(
    int64_t, const C*, int64_t, int64_t, bool, const C*, int64_t, C*, int64_t, bool, int, bool,
    bool, const C*, Activation, PackBuffers<C>);

template <
    class C, int kVectors, bool kTail, Copying kCopying = kNothing,
    class = std::make_integer_sequence<int, mr_of(kVectors)>>
struct Microkernels;
template <class C, int kVectors, bool kTail, Copying kCopying, int... kRow>
struct Microkernels<C, kVectors, kTail, kCopying, std::integer_sequence<int, kRow...>> {
  static constexpr Microkernel<C> kByRows[] = {
      microkernel<C, kRow + 1, kVectors, kTail, kCopying>...};
};

template <class C>
const Microkernel<C>* microkernels(int vectors, bool tail) {
  switch (vectors) {
    case 1:
      return tail ? Microkernels<C, 1, true>::kByRows : Microkernels<C, 1, false>::kByRows;
    case 2:
      return tail ? Microkernels<C, 2, true>::kByRows : Microkernels<C, 2, false>::kByRows;
    case 3:
      if constexpr (kNrVectors >= 3) {
        return tail ? Microkernels<C, 3, true>::kByRows : Microkernels<C, 3, false>::kByRows;
      }
      break;
    case 4:
      if constexpr (kNrVectors >= 4) {
        return tail ? Microkernels<C, 4, true>::kByRows : Microkernels<C, 4, false>::kByRows;
      }
      break;
  }
  __builtin_unreachable();
}

// Those of one row, which are wider.
template <class C>
Microkernel<C> microkernel_of_one_row(int vectors, bool tail) {
  constexpr auto all = []<int... kVector>(std::integer_sequence<int, kVector...>) {
    return std::array{
        std::array{microkernel<C, 1, kVector + 1, false, kNothing>...},
        std::array{microkernel<C, 1, kVector + 1, true, kNothing>...}};
  }(std::make_integer_sequence<int, kRowVectors>{});
  return all[tail][vectors - 1];
}

// Those of whole vectors that copy.
template <class C>
const Microkernel<C>* copying_microkernels(int vectors, bool a, bool b) {
  if constexpr (kCopies) {
    const auto of = [&]<int kVectors>(std::integral_constant<int, kVectors>) {
      return !b  ? Microkernels<C, kVectors, false, kA>::kByRows
             : a ? Microkernels<C, kVectors, false, kBoth>::kByRows
                 : Microkernels<C, kVectors, false, kB>::kByRows;
    };
    return vectors == kNrVectors ? of(std::integral_constant<int, kNrVectors>{})
                                 : of(std::integral_constant<int, kLeastCopied>{});
  }
  __builtin_unreachable();
}
