// What follows the sums: bias, activation, rounding; and its gradient.
//
// A long activation runs over a piece of values in level-1 cache, in a loop of its own, so that it
// is compiled once for each type of sums and not for each type that is stored.

constexpr int64_t kPiece = 512;

template <class T>
void epilogue(
    int64_t rows, int64_t cols, const acc_t<T>* in, int64_t in_row, const T* bias, Activation act,
    T* out, int64_t ld_out) {
  using C = acc_t<T>;
  const auto sum = [&](int64_t i, int64_t j, int n) __attribute__((always_inline)) {
    const vec<C> v = load_n(in + i * in_row + j, n);
    return bias ? add_in_order<C>(v, load_n(bias + j, n)) : v;
  };
  if (row_of(act).in_registers) {
    for (int64_t i = 0; i < rows; ++i) {
      for_vectors<C>(
          cols,
          BODY { store_n(out + i * ld_out + j, activate_in_registers<C>(sum(i, j, n), act), n); });
    }
    return;
  }
  if constexpr (std::is_same_v<T, C>) {
    if (!bias) {
      for (int64_t i = 0; i < rows; ++i) {
        activate_into(cols, in + i * in_row, act, out + i * ld_out);
      }
      return;
    }
  }
  const bool rounds = reads_input(act);
  alignas(64) C piece[kPiece];
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t first = 0; first < cols; first += kPiece) {
      const int64_t size = first + kPiece < cols ? kPiece : cols - first;
      T* const row = out + i * ld_out + first;
      C* values = piece;
      if constexpr (std::is_same_v<T, C>) {
        values = row;
      }
      for_vectors<C>(
          size, BODY {
            const vec<C> v = sum(i, first + j, n);
            store_n(values + j, rounds ? rounded<T>(v) : v, n);
          });
      activate(1, size, values, size, act);
      if constexpr (!std::is_same_v<T, C>) {
        for_vectors<C>(size, BODY { store_n(row + j, load_n(values + j, n), n); });
      }
    }
  }
}

template <class T>
void act_backward(
    int64_t rows, int64_t cols, const T* dy, int64_t ld_dy, const T* y, Activation act, T* dz,
    acc_t<T>* db) {
  using C = acc_t<T>;
  const auto keep = [&](int64_t i, int64_t j, vec<C> g, int n) __attribute__((always_inline)) {
    if (dz) {
      store_n(dz + i * cols + j, g, n);
    }
    if (db) {
      store_n(db + j, load_n(db + j, n) + g, n);
    }
  };
  if (row_of(act).in_registers) {
    for (int64_t i = 0; i < rows; ++i) {
      for_vectors<C>(
          cols, BODY {
            const vec<C> g = load_n(dy + i * ld_dy + j, n);
            keep(
                i, j,
                act == Activation::kRelu
                    ? activation_gradient<Activation::kRelu, C>(g, load_n(y + i * cols + j, n), 0)
                    : g,
                n);
          });
    }
    return;
  }
  alignas(64) C made[kPiece];
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t first = 0; first < cols; first += kPiece) {
      const int64_t size = first + kPiece < cols ? kPiece : cols - first;
      const T *const g = dy + i * ld_dy + first, *const by = y + i * cols + first;
      if constexpr (std::is_same_v<T, C>) {
        C* const out = dz ? dz + i * cols + first : made;
        differentiate(size, g, by, act, out);
        if (db) {
          for_vectors<C>(
              size,
              BODY { store_n(db + first + j, load_n(db + first + j, n) + load_n(out + j, n), n); });
        }
      } else {
        alignas(64) C read[kPiece];
        for_vectors<C>(
            size, BODY {
              store_n(made + j, load_n(g + j, n), n);
              store_n(read + j, load_n(by + j, n), n);
            });
        differentiate(size, made, read, act, made);
        // Rounded, as the bias's gradient sums what the weight's gradient reads.
        for_vectors<C>(size, BODY { keep(i, first + j, rounded<T>(load_n(made + j, n)), n); });
      }
    }
  }
}
