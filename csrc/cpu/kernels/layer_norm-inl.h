// Layer normalisation, a row at a time. Statistics are summed in float64 of values from which the
// mean is taken away, so that a mean far from zero costs no digits.

// v, and zeros behind its first n lanes.
template <class C>
INLINE vec<C> first_lanes_of(vec<C> v, int n) {
  if (n == kLanes<C>) {
    return v;
  }
  C lanes[kLanes<C>];
  store(lanes, v);
  return load_part(lanes, n);
}

// parts += a * b, widened before they are multiplied: no product overflows.
INLINE void add_wide_product(Doubles* parts, vec<double> a, vec<double> b) { parts[0] += a * b; }
INLINE void add_wide_product(Doubles* parts, vec<float> a, vec<float> b) {
  half_width of_a[2], of_b[2];
  std::memcpy(of_a, &a, sizeof(a));
  std::memcpy(of_b, &b, sizeof(b));
  parts[0] += widen(of_a[0]) * widen(of_b[0]);
  parts[1] += widen(of_a[1]) * widen(of_b[1]);
}

// How a row is normalised: (x - mean) * inverse, the mean in two parts, of which the first is
// taken from values near it without a rounding.
template <class C>
struct RowNorm {
  vec<C> high, low, inverse;

  INLINE vec<C> operator()(vec<C> x) const { return ((x - high) - low) * inverse; }
};

template <class T>
INLINE RowNorm<acc_t<T>> row_norm(int64_t cols, const T* x, double epsilon) {
  using C = acc_t<T>;
  const double count = static_cast<double>(cols);
  Doubles sums[2] = {}, rest[2] = {}, squares[2] = {};
  for_vectors<C>(cols, BODY { add_wide(sums, load_n(x + j, n)); });
  const vec<C> high = splat(static_cast<C>(sum_lanes(sums[0] + sums[1]) / count));
  for_vectors<C>(
      cols, BODY {
        const vec<C> d = first_lanes_of<C>(load_n(x + j, n) - high, n);
        add_wide(rest, d);
        add_wide_product(squares, d, d);
      });
  const double low = sum_lanes(rest[0] + rest[1]) / count;
  const double variance = sum_lanes(squares[0] + squares[1]) / count - low * low;
  const double inverse = 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + epsilon);
  return {high, splat(static_cast<C>(low)), splat(static_cast<C>(inverse))};
}

template <class T>
void layer_norm(
    int64_t rows, int64_t cols, const T* x, const T* weight, const T* bias, double epsilon,
    T* out) {
  using C = acc_t<T>;
  for (int64_t i = 0; i < rows; ++i, x += cols, out += cols) {
    const RowNorm<C> norm = row_norm(cols, x, epsilon);
    for_vectors<C>(
        cols, BODY {
          vec<C> y = norm(load_n(x + j, n));
          if (weight != nullptr) {
            const vec<C> w = load_n(weight + j, n);
            y = bias != nullptr ? multiply_add<C>(y, w, load_n(bias + j, n)) : y * w;
          }
          store_n(out + j, y, n);
        });
  }
}

template <class T>
void layer_norm_backward(
    int64_t rows, int64_t cols, const T* dy, const T* x, const T* weight, double epsilon, T* dx,
    acc_t<T>* dw, acc_t<T>* db) {
  using C = acc_t<T>;
  const double count = static_cast<double>(cols);
  const auto scaled = [&](int64_t j, int n) __attribute__((always_inline)) {
    const vec<C> g = load_n(dy + j, n);
    return weight != nullptr ? g * load_n(weight + j, n) : g;
  };
  for (int64_t i = 0; i < rows; ++i, dy += cols, x += cols) {
    const RowNorm<C> norm = row_norm(cols, x, epsilon);
    if (dx != nullptr) {
      Doubles sums[2] = {}, products[2] = {};
      for_vectors<C>(
          cols, BODY {
            const vec<C> g = scaled(j, n);  // zero behind the row
            add_wide(sums, g);
            add_wide_product(products, g, first_lanes_of<C>(norm(load_n(x + j, n)), n));
          });
      const vec<C> mean = splat(static_cast<C>(sum_lanes(sums[0] + sums[1]) / count));
      const vec<C> slope = splat(static_cast<C>(sum_lanes(products[0] + products[1]) / count));
      for_vectors<C>(
          cols, BODY {
            const vec<C> v = norm(load_n(x + j, n));
            store_n(dx + j, (scaled(j, n) - mean - v * slope) * norm.inverse, n);
          });
      dx += cols;
    }
    if (dw != nullptr) {
      for_vectors<C>(
          cols, BODY {
            const vec<C> term = load_n(dy + j, n) * norm(load_n(x + j, n));
            store_n(dw + j, load_n(dw + j, n) + term, n);
          });
    }
    if (db != nullptr) {
      for_vectors<C>(cols, BODY { store_n(db + j, load_n(db + j, n) + load_n(dy + j, n), n); });
    }
  }
}
