// Activations, and their derivatives as functions of what csrc/activation.h says.

// PyTorch's formula, rounding where it rounds. Where e^-v overflows the result is 0.
template <class C>
INLINE vec<C> sigmoid(vec<C> v) {
  constexpr C kLargest = ExpConstants<C>::kLargest;
  vec<C> x = v > 40 ? vec<C>{} - 40 : -v;
  x = x > kLargest ? splat(kLargest) : x;
  const Exponential<C> e(x);
  return 1 / multiply_add<C>(e.power * (1 + e.p), splat<C>(2), splat<C>(1));
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

template <Activation kActivation, class C>
INLINE vec<C> activated(vec<C> v) {
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
    return v < 0 ? expm1_of_negative<C>(v) : v;
  } else if constexpr (kActivation == Activation::kGelu) {
    return v * Normal<C>(v).below;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // Of two NaNs, as below.
    return v != v ? v : v * sigmoid<C>(gelu_argument<C>(v));
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
template <Activation kActivation, class C>
INLINE vec<C> activation_gradient(vec<C> g, vec<C> y) {
  if constexpr (kActivation == Activation::kRelu) {
    return y <= 0 ? vec<C>{} : g;
  } else if constexpr (kActivation == Activation::kTanh) {
    return g * multiply_add<C>(-y, y, splat<C>(1));
  } else if constexpr (kActivation == Activation::kSigmoid) {
    return g * (1 - y) * y;
  } else if constexpr (kActivation == Activation::kElu) {
    return y > 0 ? g : g * (y + 1);
  } else if constexpr (kActivation == Activation::kGelu) {
    const Normal<C> normal(y);
    const vec<C> density = normal.power * splat<C>(0.3989422804014327);  // 1 / sqrt(2 pi)
    return times_derivative<C>(g, y, multiply_add<C>(y, density, normal.below));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const vec<C> s = sigmoid<C>(gelu_argument<C>(y));
    return times_derivative<C>(
        g, y, multiply_add<C>(y * s * (1 - s), gelu_argument_slope<C>(y), s));
  } else {
    return g;
  }
}

template <Activation kActivation>
struct Constant {};

// f(Constant<act>{}).
template <class F>
INLINE void with_activation(Activation act, F f) {
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
  return act == Activation::kRelu ? activated<Activation::kRelu, C>(v) : v;
}

template <class C>
void activate(int64_t m, int64_t n, C* c, int64_t ldc, Activation act) {
  if (n == ldc) {  // whole vectors: a short row would wait for the one before
    n *= m;
    m = 1;
  }
  with_activation(act, [&]<Activation kAct>(Constant<kAct>) {
    for (int64_t i = 0; i < m; ++i) {
      C* row = c + i * ldc;
      for_vectors<C>(n, BODY { store_n(row + j, activated<kAct, C>(load_n(row + j, n)), n); });
    }
  });
}
