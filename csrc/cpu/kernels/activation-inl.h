// Activations, and their derivatives as functions of what csrc/activation.h says.

// 1 + e^-v, rounding where PyTorch's formula rounds; infinite where e^-v overflows.
template <class C>
INLINE vec<C> one_and_power(vec<C> v) {
  constexpr C kLargest = ExpConstants<C>::kLargest;
  vec<C> x = v > 40 ? vec<C>{} - 40 : -v;
  x = x > kLargest ? splat(kLargest) : x;
  const Exponential<C> e(x);
  return multiply_add<C>(e.power * (1 + e.p), splat<C>(2), splat<C>(1));
}

template <class C>
INLINE vec<C> sigmoid(vec<C> v) {
  return 1 / one_and_power<C>(v);
}

// gelu_tanh(v) = v (1 + tanh(u)) / 2 = v sigmoid(2u): 2u, and its derivative.
constexpr double kGeluSlope = 1.5957691216057308, kGeluCubic = 0.044715;  // 2 sqrt(2 / pi)
template <class C>
INLINE vec<C> gelu_argument(vec<C> v) {
  return v * multiply_add<C>(v * v, splat<C>(kGeluSlope * kGeluCubic), splat<C>(kGeluSlope));
}
template <class C>
INLINE vec<C> gelu_argument_slope(vec<C> v) {
  return multiply_add<C>(v * v, splat<C>(3 * kGeluSlope * kGeluCubic), splat<C>(kGeluSlope));
}

// elu(v, alpha), times scale.
template <class C>
INLINE vec<C> elu(vec<C> v, C alpha, C scale) {
  return v < 0 ? expm1_of_negative<C>(v) * splat(alpha * scale) : v * splat(scale);
}

template <class C>
INLINE vec<C> absolute(vec<C> v) {
  return v < 0 ? -v : v;
}

// v + 3 between 0 and 6.
template <class C>
INLINE vec<C> clamped_sum(vec<C> v) {
  const vec<C> sum = v + 3;
  return sum < 0 ? vec<C>{} : sum > 6 ? splat<C>(6) : sum;
}

// mish(v) = v tanh(softplus(v)) = v numerator / denominator, from e^-|v|.
template <class C>
struct Mish {
  vec<C> e, numerator, denominator;

  INLINE explicit Mish(vec<C> v) : e(exp_of_negative<C>(-absolute<C>(v))) {
    const vec<C> square = e * e, twice = e + e;
    numerator = v < 0 ? square + twice : 1 + twice;
    denominator = numerator + (v < 0 ? splat<C>(2) : square + square);
  }
};

// x: the setting that its row speaks of (csrc/activation.h).
template <ActivationKind kActivation, class C>
INLINE vec<C> activated(vec<C> v, C x) {
  if constexpr (kActivation == Activation::kRelu) {
    return v < 0 ? vec<C>{} : v;  // keeps -0, as torch.relu does
  } else if constexpr (kActivation == Activation::kTanh) {
    using Bits = typename Vector<C>::mask;
    const Bits sign = (Bits)(-vec<C>{});
    const vec<C> t = expm1_of_negative<C>((vec<C>)((Bits)(v + v) | sign));  // of -2|v|
    return (vec<C>)(((Bits)(t / (2 + t)) & ~sign) | ((Bits)v & sign));
  } else if constexpr (kActivation == Activation::kSigmoid) {
    return sigmoid<C>(v);
  } else if constexpr (kActivation == Activation::kElu) {
    return elu<C>(v, x, 1);
  } else if constexpr (kActivation == Activation::kGelu) {
    return v * Normal<C>(v).below;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // Of two NaNs, as below.
    return v != v ? v : v * sigmoid<C>(gelu_argument<C>(v));
  } else if constexpr (kActivation == Activation::kSilu) {
    return v / one_and_power<C>(v);
  } else if constexpr (kActivation == Activation::kLeakyRelu) {
    return v > 0 ? v : v * splat(x);
  } else if constexpr (kActivation == Activation::kSelu) {
    return elu<C>(v, kSeluAlpha, kSeluScale);
  } else if constexpr (kActivation == Activation::kCelu) {
    return v < 0 ? expm1_of_negative<C>(v * splat(1 / x)) * splat(x) : v;
  } else if constexpr (kActivation == Activation::kSoftplus) {
    const vec<C> rest = log1p_of_fraction<C>(exp_of_negative<C>(-absolute<C>(v)));
    return v > 20 ? v : (v < 0 ? vec<C>{} : v) + rest;  // PyTorch's threshold
  } else if constexpr (kActivation == Activation::kLogsigmoid) {
    const vec<C> rest = log1p_of_fraction<C>(exp_of_negative<C>(-absolute<C>(v)));
    return (v < 0 ? v : vec<C>{}) - rest;
  } else if constexpr (kActivation == Activation::kMish) {
    const Mish<C> mish(v);
    return v != v ? v : v * (mish.numerator / mish.denominator);
  } else if constexpr (kActivation == Activation::kHardtanh) {
    return v < -1 ? splat<C>(-1) : v > 1 ? splat<C>(1) : v;
  } else if constexpr (kActivation == Activation::kRelu6) {
    return v < 0 ? vec<C>{} : v > 6 ? splat<C>(6) : v;
  } else if constexpr (kActivation == Activation::kHardswish) {
    return v * clamped_sum<C>(v) / 6;
  } else if constexpr (kActivation == Activation::kHardsigmoid) {
    return clamped_sum<C>(v) / 6;
  } else if constexpr (kActivation == Activation::kSoftsign) {
    return v / (absolute<C>(v) + 1);
  } else {
    return v;
  }
}

// g * d for a derivative d at y, and y or d where that is NaN: of two NaNs the compiler chooses,
// anew in each copy of a loop.
template <class C>
INLINE vec<C> times_derivative(vec<C> g, vec<C> y, vec<C> d) {
  const vec<C> product = d != d ? d : g * d;
  return y != y ? y : product;
}

// act'(z) * g as a function of y, which is act(z) or z, for its NaN and zeros as PyTorch has it.
template <ActivationKind kActivation, class C>
INLINE vec<C> activation_gradient(vec<C> g, vec<C> y, C x) {
  if constexpr (kActivation == Activation::kRelu) {
    return y <= 0 ? vec<C>{} : g;
  } else if constexpr (kActivation == Activation::kTanh) {
    return g * multiply_add<C>(-y, y, splat<C>(1));
  } else if constexpr (kActivation == Activation::kSigmoid) {
    return g * (1 - y) * y;
  } else if constexpr (kActivation == Activation::kElu) {
    return y > 0 ? g : g * (y + splat(x));
  } else if constexpr (kActivation == Activation::kGelu) {
    const Normal<C> normal(y);
    const vec<C> density = normal.power * splat<C>(0.3989422804014327);  // 1 / sqrt(2 pi)
    return times_derivative<C>(g, y, multiply_add<C>(y, density, normal.below));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const vec<C> s = sigmoid<C>(gelu_argument<C>(y));
    return times_derivative<C>(
        g, y, multiply_add<C>(y * s * (1 - s), gelu_argument_slope<C>(y), s));
  } else if constexpr (kActivation == Activation::kSilu) {
    const vec<C> s = sigmoid<C>(y);
    return times_derivative<C>(g, y, multiply_add<C>(y * s, 1 - s, s));
  } else if constexpr (kActivation == Activation::kLeakyRelu) {
    return y > 0 ? g : g * splat(x);
  } else if constexpr (kActivation == Activation::kSelu) {
    constexpr C kScale = kSeluScale, kLeast = kSeluScale * kSeluAlpha;
    return y > 0 ? g * splat(kScale) : g * (y + splat(kLeast));
  } else if constexpr (kActivation == Activation::kCelu) {
    return y > 0 ? g : g * (splat(1 / x) * (y + splat(x)));
  } else if constexpr (kActivation == Activation::kSoftplus) {
    const vec<C> d = -expm1_of_negative<C>(-y);  // sigmoid(v) = 1 - e^-y
    return times_derivative<C>(g, y, y > 20 ? splat<C>(1) : d);
  } else if constexpr (kActivation == Activation::kLogsigmoid) {
    return times_derivative<C>(g, y, -expm1_of_negative<C>(y));  // sigmoid(-v) = 1 - e^y
  } else if constexpr (kActivation == Activation::kMish) {
    // tanh(softplus(v)) + v sigmoid(v) (1 - tanh(softplus(v))^2)
    const Mish<C> mish(y);
    const vec<C> part = 4 * (1 + mish.e) * (y < 0 ? mish.e : mish.e * mish.e);
    const vec<C> d = (mish.numerator + y * part / mish.denominator) / mish.denominator;
    return times_derivative<C>(g, y, d);
  } else if constexpr (kActivation == Activation::kHardtanh) {
    return y <= -1 ? vec<C>{} : y >= 1 ? vec<C>{} : g;
  } else if constexpr (kActivation == Activation::kRelu6) {
    return y <= 0 ? vec<C>{} : y >= 6 ? vec<C>{} : g;
  } else if constexpr (kActivation == Activation::kHardswish) {
    const vec<C> inner = times_derivative<C>(g, y, y / 3 + splat<C>(0.5));
    return y <= -3 ? vec<C>{} : y >= 3 ? g : inner;
  } else if constexpr (kActivation == Activation::kHardsigmoid) {
    return y > -3 ? (y < 3 ? g / 6 : vec<C>{}) : vec<C>{};
  } else if constexpr (kActivation == Activation::kSoftsign) {
    const vec<C> sum = absolute<C>(y) + 1;
    return times_derivative<C>(g, y, 1 / (sum * sum));
  } else {
    return g;
  }
}

template <ActivationKind kActivation>
struct Constant {};

// f(Constant<act>{}).
template <class F>
INLINE void with_activation(ActivationKind act, F f) {
  switch (act) {
    case Activation::kNone:
      return f(Constant<Activation::kNone>{});
#define CASE(enumerator, ...)  \
  case Activation::enumerator: \
    return f(Constant<Activation::enumerator>{});
      MYLAYERS_ACTIVATIONS(CASE)
#undef CASE
  }
}

template <class C>
INLINE vec<C> activate_in_registers(vec<C> v, Activation act) {
  return act == Activation::kRelu ? activated<Activation::kRelu, C>(v, 0) : v;
}

// c (m, n) = act(c).
template <class C>
void activate(int64_t m, int64_t n, C* c, int64_t ldc, Activation act) {
  if (n == ldc) {  // whole vectors: a short row would wait for the one before
    n *= m;
    m = 1;
  }
  const C setting = act.setting;
  with_activation(act, [&]<ActivationKind kAct>(Constant<kAct>) {
    for (int64_t i = 0; i < m; ++i) {
      C* row = c + i * ldc;
      for_vectors<C>(
          n, BODY { store_n(row + j, activated<kAct, C>(load_n(row + j, n), setting), n); });
    }
  });
}

// out (n) = act(in): for much memory, whose loads go on while others are computed with. One vector
// a turn, as the compiler does not know that what it stores is not what it loads next.
template <class C>
void activate_into(int64_t n, const C* in, Activation act, C* out) {
  const C setting = act.setting;
  with_activation(act, [&]<ActivationKind kAct>(Constant<kAct>) {
    for_vectors<C, 1>(
        n, BODY { store_n(out + j, activated<kAct, C>(load_n(in + j, n), setting), n); });
  });
}

// out (n) = g act', as a function of y; out may be g.
template <class C>
void differentiate(int64_t n, const C* g, const C* y, Activation act, C* out) {
  const C setting = act.setting;
  with_activation(act, [&]<ActivationKind kAct>(Constant<kAct>) {
    for_vectors<C>(
        n, BODY {
          const vec<C> by = load_n(y + j, n);
          store_n(out + j, activation_gradient<kAct, C>(load_n(g + j, n), by, setting), n);
        });
  });
}
