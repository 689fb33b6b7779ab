// Squares of values transposed in registers.

template <class V, class M>
INLINE V shuffle(V a, V b, M index) {
#if defined(__clang__)
  constexpr int n = sizeof(M) / sizeof(index[0]);
  V out;
  for (int i = 0; i < n; ++i) {
    out[i] = index[i] < n ? a[index[i]] : b[index[i] - n];
  }
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Even (kOdd = 0) or odd units of x, then of y, within each group of 2 * kHalf units.
template <class C, int kUnit, int kHalf, int kOdd>
INLINE vec<C> deinterleave(vec<C> x, vec<C> y) {
  typename Vector<C>::mask index{};
  UNROLL
  for (int l = 0; l < kLanes<C>; ++l) {
    const int in_unit = l % kUnit, unit = l / kUnit % (2 * kHalf),
              group = l - in_unit - unit * kUnit;
    const int from = group + (2 * (unit % kHalf) + kOdd) * kUnit + in_unit;
    index[l] = unit < kHalf ? from : kLanes<C> + from;
  }
  return shuffle(x, y, index);
}

// Transpose a square of kLanes x kLanes into r, given halves(l, m, h): half h of its row l, then of
// row m. First squares of kInside lanes change places, then they are transposed, so that no shuffle
// needs an index register and most stay inside 16 bytes: cores do fewer of the others in a cycle.
template <class C, class Halves>
INLINE void transpose_halves(vec<C> (&r)[kLanes<C>], Halves halves) {
  constexpr int kOutside = kBytes >= 64 ? 4 : 2, kInside = kLanes<C> / kOutside;
  UNROLL
  for (int l = 0; l < kInside; ++l) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
      const vec<C> x = halves(l, l + kInside, h);
      if constexpr (kOutside == 2) {
        r[h * kInside + l] = x;
      } else {
        const vec<C> y = halves(l + 2 * kInside, l + 3 * kInside, h);
        r[2 * h * kInside + l] = deinterleave<C, kInside, 2, 0>(x, y);
        r[(2 * h + 1) * kInside + l] = deinterleave<C, kInside, 2, 1>(x, y);
      }
    }
  }
  UNROLL
  for (int square = 0; square < kOutside; ++square) {
    vec<C>* s = r + square * kInside;
    UNROLL
    for (int done = 1; done < kInside; done *= 2) {
      vec<C> old[kInside];
      UNROLL
      for (int i = 0; i < kInside; ++i) {
        old[i] = s[i];
      }
      UNROLL
      for (int i = 0; i < kInside / 2; ++i) {
        s[i] = deinterleave<C, 1, kInside / 2, 0>(old[2 * i], old[2 * i + 1]);
        s[i + kInside / 2] = deinterleave<C, 1, kInside / 2, 1>(old[2 * i], old[2 * i + 1]);
      }
    }
  }
}

template <class C>
INLINE void transpose(vec<C> (&r)[kLanes<C>]) {
  vec<C> rows[kLanes<C>];
  UNROLL
  for (int l = 0; l < kLanes<C>; ++l) {
    rows[l] = r[l];
  }
  transpose_halves<C>(r, [&](int l, int m, int h) __attribute__((always_inline)) {
    return h == 0 ? deinterleave<C, kLanes<C> / 2, 1, 0>(rows[l], rows[m])
                  : deinterleave<C, kLanes<C> / 2, 1, 1>(rows[l], rows[m]);
  });
}

// The same from memory, row l at row(l): loads join the halves, which saves shuffles.
template <class C, class Row>
INLINE void load_transposed(vec<C> (&r)[kLanes<C>], Row row) {
  transpose_halves<C>(r, [&](int l, int m, int h) __attribute__((always_inline)) {
    return load_halves<C>(row(l) + h * (kLanes<C> / 2), row(m) + h * (kLanes<C> / 2));
  });
}
