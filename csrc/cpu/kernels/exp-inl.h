// e^x and e^x - 1 in vectors.

// How e^x is computed. kLn2High has so few bits that its product with any exponent is exact.
// kMagic rounds what is added to it to an integer, which its low bits then hold. The series is
// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, to half a unit in the last place of e^r.
template <class C>
struct ExpConstants;
// Those of SLEEF's expf, which PyTorch calls: its formula for sigmoid doubles a difference in the
// last place of e^x, so that another series would be up to 3 units from it.
template <>
struct ExpConstants<float> {
  static constexpr float kMagic = 0x1.8p23f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kLargest = 89;  // its exponential is beyond the largest number
  static constexpr int kBits = 23, kBias = 127, kTerms = 6;
  static constexpr float kSeries[kTerms] = {0.5f,           0x1.555556p-3f,  0x1.5554f4p-5f,
                                            0x1.11114cp-7f, 0x1.6d2d92p-10f, 0x1.a057b4p-13f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kMagic = 0x1.8p52, kLn2High = 0x1.62e42fep-1,
                          kLn2Low = 0x1.f473de6af278fp-30;
  static constexpr double kLargest = 710;
  static constexpr int kBits = 52, kBias = 1023, kTerms = 12;
  // 1 / 2!, 1 / 3!, ...
  static constexpr double kSeries[kTerms] = {
      1. / 2,     1. / 6,      1. / 24,      1. / 120,      1. / 720,        1. / 5040,
      1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600., 1. / 6227020800.};
};

// e^x = 2^n (1 + p), |p| < 0.42.
template <class C>
struct Exponential {
  vec<C> power;  // 2^(n - 1): 2^n may be beyond the largest number where e^x is not
  vec<C> p;

  INLINE explicit Exponential(vec<C> x) {
    using K = ExpConstants<C>;
    using Integers = typename Vector<C>::mask;
    const vec<C> magic = splat<C>(K::kMagic);
    const vec<C> shifted = multiply_add<C>(x, splat<C>(0x1.71547652b82fep+0), magic);
    const vec<C> n = shifted - magic;
    power = (vec<C>)(((Integers)shifted + (K::kBias - 1)) << K::kBits);
    vec<C> r = multiply_add<C>(n, splat<C>(-K::kLn2High), x);
    r = multiply_add<C>(n, splat<C>(-K::kLn2Low), r);
    vec<C> sum = splat<C>(K::kSeries[K::kTerms - 1]);
    UNROLL
    for (int i = K::kTerms - 2; i >= 0; --i) {
      sum = multiply_add<C>(sum, r, splat<C>(K::kSeries[i]));
    }
    p = multiply_add<C>(r * r, sum, r);
  }
};

// Every comparison is false for NaN, which so passes on.

// e^x - 1 for x <= 0; below -40 it is -1 in float and double alike.
template <class C>
INLINE vec<C> expm1_of_negative(vec<C> x) {
  const Exponential<C> e(x < -40 ? vec<C>{} - 40 : x);
  const vec<C> power = e.power + e.power;
  return multiply_add<C>(power, e.p, power - 1);
}

// e^x for x <= 0. Far below 0 it is e^(x + d) e^-d, as 2^n would be no normal number.
template <class C>
INLINE vec<C> exp_of_negative(vec<C> x) {
  constexpr C kDistance = sizeof(C) == 4 ? 40 : 400, kLeast = sizeof(C) == 4 ? -80 : -700;
  constexpr C kPower = sizeof(C) == 4 ? 0x1.397924p-58 : 0x1.e50c483c04dcdp-578;
  const vec<C> near = x < -kDistance ? x + kDistance : x;
  const Exponential<C> e(near < kLeast ? splat(kLeast) : near);
  const vec<C> power = e.power + e.power, value = multiply_add<C>(power, e.p, power);
  return x < -kDistance ? value * splat(kPower) : value;
}

// log(1 + e) for 0 <= e <= 1: 2 atanh(e / (2 + e)), by its series.
template <class C>
INLINE vec<C> log1p_of_fraction(vec<C> e) {
  constexpr int kTerms = sizeof(C) == 4 ? 8 : 17;
  const vec<C> s = e / (2 + e), square = s * s;
  vec<C> sum = splat<C>(C(1) / (2 * kTerms - 1));
  UNROLL
  for (int i = kTerms - 2; i > 0; --i) {
    sum = multiply_add<C>(sum, square, splat<C>(C(1) / (2 * i + 1)));
  }
  return multiply_add<C>((s + s) * square, sum, s + s);
}
