// The microkernel: MR x NR of c in registers, over the terms of one call.

// What a tile copies of what it reads, so that others find it in the order of their steps. That
// costs it a store or two a step; copied beforehand, 32 rows of 1024 x 1024 took 1.1 times as long.
enum Copying { kNothing, kA, kB, kBoth };

// One register tile: rows x (vectors * kLanes) of c, the last vector cut to `tail` lanes
// if kTail. `ask_a`, `ask_c`: there are rows of them below, to be asked for.
template <class C, int kRows, int kVectors, bool kTail, Copying kCopying>
void tile(
    int64_t k, const C* a, int64_t a_row, int64_t a_col, bool ask_a, const C* b, int64_t b_row,
    C* c, int64_t c_row, bool ask_c, int tail, bool accumulate, bool finish, const C* bias,
    Activation act, Copies<C> copies) {
  constexpr int L = kLanes<C>;
  RowsBelow<kRows> below(a, a_row * static_cast<int64_t>(sizeof(C)));
  const auto get = [&](const C* p, int v) __attribute__((always_inline)) {
    return kTail && v == kVectors - 1 ? load_part(p + v * L, tail) : load(p + v * L);
  };
  vec<C> sum[kRows][kVectors];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = accumulate ? get(c + i * c_row, v) : vec<C>{};
    }
  }
  if (ask_c) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      prefetch_row<kVectors>(c, (kRows + i) * c_row);
    }
  }
  _Pragma("GCC unroll kUnroll") for (int64_t p = 0; p < k; ++p) {
    if (ask_a) {
      below.ask();
    }
    vec<C> row[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      row[v] = in_register(get(b, v));
      if constexpr ((kCopying & kB) != 0) {
        store(copies.b + v * L, row[v]);
      }
    }
    if constexpr ((kCopying & kB) != 0) {
      prefetch_row<kVectors>(b, kAhead * b_row);
      copies.b += kVectors * L;
    }
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const C x = load_bits<C>(a + i * a_row);
      if constexpr ((kCopying & kA) != 0) {
        copies.a[i] = x;
      }
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = multiply_add<C>(splat(x), row[v], sum[i][v]);
      }
    }
    if constexpr ((kCopying & kA) != 0) {
      copies.a += kRows;
    }
    a += a_col;
    b += b_row;
  }
  if (finish) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const vec<C> add = bias ? get(bias, v) : vec<C>{};
      UNROLL
      for (int i = 0; i < kRows; ++i) {
        sum[i][v] = activate_in_tile<C>(bias ? add_in_order<C>(sum[i][v], add) : sum[i][v], act);
      }
    }
  }
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      C* out = c + i * c_row + v * L;
      if (kTail && v == kVectors - 1) {
        store_part(out, sum[i][v], tail);
      } else {
        store(out, sum[i][v]);
      }
    }
  }
}

template <class C>
using Tile = void (*)(
    int64_t, const C*, int64_t, int64_t, bool, const C*, int64_t, C*, int64_t, bool, int, bool,
    bool, const C*, Activation, Copies<C>);

template <
    class C, int kVectors, bool kTail, Copying kCopying = kNothing,
    class = std::make_integer_sequence<int, tile_rows(kVectors)>>
struct Tiles;
template <class C, int kVectors, bool kTail, Copying kCopying, int... kRow>
struct Tiles<C, kVectors, kTail, kCopying, std::integer_sequence<int, kRow...>> {
  static constexpr Tile<C> kByRows[] = {tile<C, kRow + 1, kVectors, kTail, kCopying>...};
};

template <class C>
const Tile<C>* tiles(int vectors, bool tail) {
  switch (vectors) {
    case 1:
      return tail ? Tiles<C, 1, true>::kByRows : Tiles<C, 1, false>::kByRows;
    case 2:
      return tail ? Tiles<C, 2, true>::kByRows : Tiles<C, 2, false>::kByRows;
    case 3:
      if constexpr (kTileVectors >= 3) {
        return tail ? Tiles<C, 3, true>::kByRows : Tiles<C, 3, false>::kByRows;
      }
      break;
    case 4:
      if constexpr (kTileVectors >= 4) {
        return tail ? Tiles<C, 4, true>::kByRows : Tiles<C, 4, false>::kByRows;
      }
      break;
  }
  __builtin_unreachable();
}

// Those of whole vectors that copy.
template <class C>
const Tile<C>* copying_tiles(int vectors, bool a, bool b) {
  if constexpr (kCopies) {
    const auto of = [&]<int kVectors>(std::integral_constant<int, kVectors>) {
      return !b  ? Tiles<C, kVectors, false, kA>::kByRows
             : a ? Tiles<C, kVectors, false, kBoth>::kByRows
                 : Tiles<C, kVectors, false, kB>::kByRows;
    };
    return vectors == kTileVectors ? of(std::integral_constant<int, kTileVectors>{})
                                   : of(std::integral_constant<int, kLeastCopied>{});
  }
  __builtin_unreachable();
}
