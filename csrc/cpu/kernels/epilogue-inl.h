// What follows the sums: bias, activation, rounding; and its gradient.

template <class T>
void epilogue(
    int64_t rows, int64_t cols, const acc_t<T>* in, int64_t in_row, const T* bias, Activation act,
    T* out, int64_t ld_out) {
  using C = acc_t<T>;
  with_activation(act, [&]<Activation kAct>(Constant<kAct>) {
    for (int64_t i = 0; i < rows; ++i) {
      for_vectors<C>(
          cols, BODY {
            vec<C> v = load_n(in + i * in_row + j, n);
            if (bias) {
              v = add_in_order<C>(v, load_n(bias + j, n));
            }
            if constexpr (reads_input(kAct)) {
              v = rounded<T>(v);
            }
            store_n(out + i * ld_out + j, activated<kAct, C>(v), n);
          });
    }
  });
}

template <class T>
void act_backward(
    int64_t rows, int64_t cols, const T* dy, int64_t ld_dy, const T* y, Activation act, T* dz,
    acc_t<T>* db) {
  using C = acc_t<T>;
  with_activation(act, [&]<Activation kAct>(Constant<kAct>) {
    for (int64_t i = 0; i < rows; ++i) {
      for_vectors<C>(
          cols, BODY {
            vec<C> g = load_n(dy + i * ld_dy + j, n);
            if constexpr (kAct != Activation::kNone) {
              g = activation_gradient<kAct, C>(g, load_n(y + i * cols + j, n));
              if constexpr (kAct != Activation::kRelu) {
                g = rounded<T>(g);  // the bias's gradient sums what the weight's gradient reads
              }
            }
            if (dz) {
              store_n(dz + i * cols + j, g, n);
            }
            if (db) {
              store_n(db + j, load_n(db + j, n) + g, n);
            }
          });
    }
  });
}
