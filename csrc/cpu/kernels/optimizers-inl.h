// Updates of parameters. Where ATen's kernels add a product, the compilers of PyTorch's releases
// fuse it as multiply_add does: at AVX2 and AVX-512 and on Arm they do, at the lowest level not.

template <class T>
INLINE vec<T> constant(double x) {
  return splat(static_cast<T>(x));
}

template <class T>
class Gradient {
 public:
  INLINE explicit Gradient(const GradientRule& rule)
      : maximize_(rule.maximize),
        decays_(rule.weight_decay != 0),
        decay_(constant<T>(rule.weight_decay)) {}

  INLINE vec<T> operator()(const T* gradient, const T* parameter, int n) const {
    vec<T> g = load_n(gradient, n);
    if (maximize_) {
      g = -g;
    }
    return decays_ ? multiply_add<T>(load_n(parameter, n), decay_, g) : g;
  }

 private:
  bool maximize_, decays_;
  vec<T> decay_;
};

// a.lerp(b, weight): from the nearer end.
template <class T>
class Lerp {
 public:
  INLINE explicit Lerp(double weight) {
    const T w = static_cast<T>(weight);
    from_a_ = (w < 0 ? -w : w) < T(0.5);
    factor_ = splat(from_a_ ? w : w - 1);
  }
  INLINE vec<T> operator()(vec<T> a, vec<T> b) const {
    return multiply_add<T>(factor_, b - a, from_a_ ? a : b);
  }

 private:
  bool from_a_;
  vec<T> factor_;
};

// Of two numbers as torch.maximum has it: NaN if either is.
template <class T>
INLINE vec<T> larger(vec<T> a, vec<T> b) {
  return (a > b) | (a != a) ? a : b;
}

template <class T>
void sgd(int64_t count, const SgdRule& rule, const T* gradient, T* parameter, T* momentum) {
  const Gradient<T> gradient_of(rule.gradient);
  const vec<T> rate = constant<T>(rule.rate);
  if (momentum == nullptr) {
    for_vectors<T>(
        count, BODY {
          const vec<T> g = gradient_of(gradient + j, parameter + j, n);
          store_n(parameter + j, multiply_add<T>(g, rate, load_n(parameter + j, n)), n);
        });
    return;
  }
  const vec<T> kept = constant<T>(rule.momentum), gain = constant<T>(rule.gain);
  for_vectors<T>(
      count, BODY {
        vec<T> g = gradient_of(gradient + j, parameter + j, n);
        const vec<T> moved = multiply_add<T>(g, gain, load_n(momentum + j, n) * kept);
        store_n(momentum + j, moved, n);
        g = rule.nesterov ? multiply_add<T>(moved, kept, g) : moved;
        store_n(parameter + j, multiply_add<T>(g, rate, load_n(parameter + j, n)), n);
      });
}

template <class T>
void adam_moments(
    int64_t count, const AdamRule& rule, const T* gradient, T* parameter, T* mean, T* square,
    T* largest, T* squares) {
  const Gradient<T> gradient_of(rule.gradient);
  const Lerp<T> lerp(rule.mean_gain);
  const vec<T> shrink = constant<T>(rule.shrink), gain = constant<T>(rule.gain);
  const vec<T> beta2 = constant<T>(rule.beta2);
  for_vectors<T>(
      count, BODY {
        const vec<T> g = gradient_of(gradient + j, parameter + j, n);
        if (rule.shrinks) {
          store_n(parameter + j, load_n(parameter + j, n) * shrink, n);
        }
        store_n(mean + j, lerp(load_n(mean + j, n), g), n);
        vec<T> v = multiply_add<T>(gain * g, g, load_n(square + j, n) * beta2);
        store_n(square + j, v, n);
        if (largest != nullptr) {
          v = larger<T>(load_n(largest + j, n), v);
          store_n(largest + j, v, n);
        }
        store_n(squares + j, v, n);
      });
}

template <class T>
void adam(int64_t count, const AdamRule& rule, const T* roots, const T* mean, T* parameter) {
  const vec<T> root = constant<T>(rule.root), epsilon = constant<T>(rule.epsilon);
  const vec<T> rate = constant<T>(rule.rate);
  for_vectors<T>(
      count, BODY {
        const vec<T> denominator = load_n(roots + j, n) / root + epsilon;
        const vec<T> change = rate * load_n(mean + j, n) / denominator;
        store_n(parameter + j, load_n(parameter + j, n) + change, n);
      });
}

template <class T>
void rmsprop_moments(
    int64_t count, const RmspropRule& rule, const T* gradient, const T* parameter, T* square,
    T* mean, T* squares) {
  const Gradient<T> gradient_of(rule.gradient);
  const Lerp<T> lerp(rule.gain);
  const vec<T> alpha = constant<T>(rule.alpha), gain = constant<T>(rule.gain);
  for_vectors<T>(
      count, BODY {
        const vec<T> g = gradient_of(gradient + j, parameter + j, n);
        vec<T> v = multiply_add<T>(gain * g, g, load_n(square + j, n) * alpha);
        store_n(square + j, v, n);
        if (mean != nullptr) {
          const vec<T> m = lerp(load_n(mean + j, n), g);
          store_n(mean + j, m, n);
          v = multiply_add<T>(-m, m, v);
        }
        store_n(squares + j, v, n);
      });
}

template <class T>
void rmsprop(
    int64_t count, const RmspropRule& rule, const T* roots, const T* gradient, T* parameter,
    T* momentum) {
  const Gradient<T> gradient_of(rule.gradient);
  const vec<T> epsilon = constant<T>(rule.epsilon), kept = constant<T>(rule.momentum);
  const vec<T> rate = constant<T>(rule.rate);
  for_vectors<T>(
      count, BODY {
        const vec<T> g = gradient_of(gradient + j, parameter + j, n);
        const vec<T> denominator = load_n(roots + j, n) + epsilon;
        vec<T> p = load_n(parameter + j, n);
        if (momentum != nullptr) {
          const vec<T> moved = load_n(momentum + j, n) * kept + g / denominator;
          store_n(momentum + j, moved, n);
          p = multiply_add<T>(moved, rate, p);
        } else {
          p = p + rate * g / denominator;
        }
        store_n(parameter + j, p, n);
      });
}

template <class T>
void adagrad_sum(
    int64_t count, const AdagradRule& rule, const T* gradient, const T* parameter, T* sum,
    T* squares) {
  const Gradient<T> gradient_of(rule.gradient);
  for_vectors<T>(
      count, BODY {
        const vec<T> g = gradient_of(gradient + j, parameter + j, n);
        const vec<T> s = multiply_add<T>(g, g, load_n(sum + j, n));
        store_n(sum + j, s, n);
        store_n(squares + j, s, n);
      });
}

template <class T>
void adagrad(
    int64_t count, const AdagradRule& rule, const T* roots, const T* gradient, T* parameter) {
  const Gradient<T> gradient_of(rule.gradient);
  const vec<T> epsilon = constant<T>(rule.epsilon), rate = constant<T>(rule.rate);
  for_vectors<T>(
      count, BODY {
        const vec<T> g = gradient_of(gradient + j, parameter + j, n);
        const vec<T> denominator = load_n(roots + j, n) + epsilon;
        store_n(parameter + j, load_n(parameter + j, n) + rate * g / denominator, n);
      });
}
