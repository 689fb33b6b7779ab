// The standard normal distribution in vectors.

// P(X < -a) = e^(-a^2 / 2) t q(2t - 1) for a >= 0 and t = 4 / (4 + a), with q interpolated at
// Chebyshev's points (docs/lab/2026-11-gelu.md): as exact, relative to its size, far below the mean
// as near it.
template <class C>
struct NormalConstants;
template <>
struct NormalConstants<float> {
  static constexpr float kEnd = 13;  // beyond, e^(-a^2 / 2) is no normal number
  static constexpr int kTerms = 11;
  static constexpr float kSeries[kTerms] = {0x1.82b4bcp-3f,   0x1.373e32p-3f,   0x1.8c6dbep-4f,
                                            0x1.7e01b8p-5f,   0x1.eec4f4p-7f,   0x1.ec5254p-10f,
                                            -0x1.c81fe6p-11f, -0x1.99eff6p-12f, 0x1.184a9ep-15f,
                                            0x1.49ecd6p-15f,  -0x1.d0af12p-22f};
};
template <>
struct NormalConstants<double> {
  static constexpr double kEnd = 37.5;
  static constexpr int kTerms = 24;
  static constexpr double kSeries[kTerms] = {
      0x1.82b4bb8c94dcdp-3,  0x1.373e3a893c28cp-3,  0x1.8c6dbf2cfc388p-4,   0x1.7dff2bff68080p-5,
      0x1.eec4cc3e39776p-7,  0x1.ee2761054501fp-10, -0x1.c81719be71757p-11, -0x1.ab825feed60c0p-12,
      0x1.17a4a08efb4f6p-15, 0x1.e4a43156c4564p-15, -0x1.000b3fd28b8a4p-21, -0x1.26d18d992c1ccp-17,
      0x1.7fa62c0d145c8p-23, 0x1.8d6480ccf6ccap-20, -0x1.4f852d0cd4c1ep-23, -0x1.1316b229f3154p-22,
      0x1.1c4173fea8cfep-24, 0x1.571caa0900ce5p-25, -0x1.525f7cf095528p-26, -0x1.3292d28468146p-28,
      0x1.14091d7a7c750p-28, 0x1.42e7f2a5e9142p-33, -0x1.d02cb8b1aece5p-32, 0x1.07d58223a74e6p-35};
};

// Of x, which it is of: the share below it, and e^(-x^2 / 2).
template <class C>
struct Normal {
  vec<C> below, power;

  INLINE explicit Normal(vec<C> x) {
    using K = NormalConstants<C>;
    const vec<C> distance = x < 0 ? -x : x;
    const vec<C> a = distance > K::kEnd ? splat<C>(K::kEnd) : distance;
    const vec<C> square = a * a;
    const Exponential<C> e(square * splat<C>(-0.5));
    const vec<C> twice = e.power + e.power;
    power = multiply_add<C>(twice, e.p, twice);
    // What rounding took from the square.
    power = multiply_add<C>(power, multiply_add<C>(a, a, -square) * splat<C>(-0.5), power);
    power = distance > K::kEnd ? vec<C>{} : power;
    const vec<C> t = splat<C>(4) / (a + 4);
    const vec<C> u = t + t - 1;
    vec<C> sum = splat<C>(K::kSeries[K::kTerms - 1]);
    UNROLL
    for (int i = K::kTerms - 2; i >= 0; --i) {
      sum = multiply_add<C>(sum, u, splat<C>(K::kSeries[i]));
    }
    const vec<C> tail = power * (t * sum);
    below = x < 0 ? tail : 1 - tail;
  }
};
