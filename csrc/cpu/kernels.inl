// Body of kernels_*.cpp: see kernels.h for what each function computes.
//
// The target pragma stands after the last #include and everything below lives in a
// namespace of its own, so no inline function of another header is ever compiled for an
// instruction set that the processor at hand may lack.

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define MYLAYERS_IS_generic 0
#define MYLAYERS_IS_avx2 1
#define MYLAYERS_IS_avx512 2
#define MYLAYERS_CONCAT_(a, b) a##b
#define MYLAYERS_CONCAT(a, b) MYLAYERS_CONCAT_(a, b)
#define MYLAYERS_LEVEL MYLAYERS_CONCAT(MYLAYERS_IS_, MYLAYERS_ISA)
#define MYLAYERS_STRING_(a) #a
#define MYLAYERS_STRING(a) MYLAYERS_STRING_(a)

#define MYLAYERS_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define MYLAYERS_TARGET(list) \
  MYLAYERS_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define MYLAYERS_TARGET_END MYLAYERS_PRAGMA(clang attribute pop)
#else
#define MYLAYERS_TARGET(list) MYLAYERS_PRAGMA(GCC push_options) MYLAYERS_PRAGMA(GCC target(list))
#define MYLAYERS_TARGET_END MYLAYERS_PRAGMA(GCC pop_options)
#endif

#if MYLAYERS_LEVEL == 2
MYLAYERS_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#elif MYLAYERS_LEVEL == 1
MYLAYERS_TARGET("avx2,fma,f16c")
#endif

namespace mylayers::cpu::MYLAYERS_ISA {
namespace {

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// ---- vectors ------------------------------------------------------------------------

constexpr int kBytes = MYLAYERS_LEVEL == 2 ? 64 : MYLAYERS_LEVEL == 1 ? 32 : 16;
// Vectors across a whole register tile, and rows of one of so many vectors: 24 of AVX-512's 32
// registers hold sums, 12 of the 16 of others, leaving room for one row of b and the broadcast
// element of a. With AVX2 a step of 4 rows and 3 vectors takes 7 loads where 6 and 2 take 8: on
// Zen 3 1024 x 1024 x 1024 took 0.93 to 0.98 of the time, 64 x 1024 x 1024 0.76 to 1.01.
// Without multiply-adds a 16th register holds the product. Of one vector twice as many rows: six
// sums would wait for their last multiply-adds.
constexpr int kTileVectors = MYLAYERS_LEVEL == 2 ? 4 : MYLAYERS_LEVEL == 1 ? 3 : 2;
constexpr int tile_rows(int vectors) {
  return vectors == 1 ? 12 : vectors == 3 ? (MYLAYERS_LEVEL == 2 ? 8 : 4) : 6;
}
constexpr int kTileRows = tile_rows(kTileVectors);
constexpr int kLeastCopied = 2;  // vectors of a strip of b that tiles copy
// stream_many holds kManySteps rows of kManyVectors vectors of b in registers, and beside them the
// sums of kManyTogether rows of a. With 16 registers, eight rows of one vector took 1.2 to 1.35
// times as long at 16 to 64 rows of 4096 x 4096: each of their multiply-adds needs a broadcast.
constexpr int kManyVectors = 2;
constexpr int kManySteps = MYLAYERS_LEVEL == 2 ? kStreamDepth : 6;
constexpr int kManyTogether = MYLAYERS_LEVEL == 2 ? 2 : 1;
// Steps of a tile's loop in one turn: where another thread shared the core, one at a time took 1.1
// to 1.16 times as long, as 12 multiply-adds came with 13 other instructions; elsewhere no longer.
constexpr int kUnroll = MYLAYERS_LEVEL == 2 ? 1 : 4;
// Measured on Zen 5 (AVX-512), and on Zen 3 at the two other levels. Level 2 of Zen 3, of 512 KiB
// in 8 ways, holds 128 rows that lie 4 KiB apart: without copies 1024 x 1024 x 1024 took 1.5 times
// as long in float32, its weight gradient 1.7 times, 256 x 256 x 256 1.15 times; and 8 and 16 rows
// of 4096 x 4096, on one thread, 1.06 to 1.1 times in runs of 2048 columns. On the Zen 5 float16 of
// 65 to 128 rows streams at 0.99 to 1.08 of the speed of tiles on a core of its own, at 0.83 to
// 0.94 on one that others slow down.
constexpr Tuning kTuning = MYLAYERS_LEVEL == 2
                               ? Tuning{128, 64, 0, 2048, 0, 0, 0, Source::kMemory, 0}
                               : Tuning{48, 32, 16, 4096, 32, 0, 0, Source::kMemory, 0};
constexpr const char* kTunedFor = MYLAYERS_LEVEL == 2 ? "Zen 5" : "Zen 3";
constexpr bool kCopies = kTuning.copying > 0;

template <class C>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(kBytes)));
  typedef int32_t mask __attribute__((vector_size(kBytes)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kBytes)));
  typedef int64_t mask __attribute__((vector_size(kBytes)));
};
template <class C>
using vec = typename Vector<C>::type;
template <class C>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(C));

// a * b + c in one rounding where the processor has it. Nothing is left to the compiler
// (-ffp-contract=off): g++ 12 contracts what it sees in one piece, and where one of several copies
// of a loop was not, 3 rows of a batch differed from 1.
template <class C>
INLINE vec<C> multiply_add(vec<C> a, vec<C> b, vec<C> c) {
#if MYLAYERS_LEVEL == 2
  if constexpr (sizeof(C) == 4) {
    return (vec<C>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else {
    return (vec<C>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
#elif MYLAYERS_LEVEL == 1
  if constexpr (sizeof(C) == 4) {
    return (vec<C>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else {
    return (vec<C>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#else
  return a * b + c;
#endif
}

// x in every lane; x + 0 would lose the sign of -0.
template <class C>
INLINE vec<C> splat(C x) {
  return x - vec<C>{};
}

// v, which the compiler must take from a register from here on. g++ 12 made what several
// multiply-adds share an operand in memory of each: a tile of 4 x 64 then waited for 20 loads where
// it needs 8, and 16 x 256 x 256 took 1.08 times as long.
template <class V>
INLINE V in_register(V v) {
#if MYLAYERS_LEVEL > 0
  asm("" : "+v"(v));
#endif
  return v;
}

// memcpy: any alignment is fine, and any compiler makes it one instruction.
template <class V, class T>
INLINE V load_bits(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

INLINE vec<float> load(const float* p) { return load_bits<vec<float>>(p); }
INLINE vec<double> load(const double* p) { return load_bits<vec<double>>(p); }
INLINE void store(float* p, vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
INLINE void store(double* p, vec<double> v) { std::memcpy(p, &v, sizeof(v)); }

typedef uint16_t u16 __attribute__((vector_size(kBytes / 2)));
typedef uint32_t u32 __attribute__((vector_size(kBytes)));

// Intrinsics, as g++ 12 cuts __builtin_convertvector into halves: bfloat16 sums then ran at half
// their speed.
#if MYLAYERS_LEVEL == 2
INLINE u32 widen(u16 v) { return (u32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v); }
INLINE u16 narrow(u32 v) { return (u16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v); }
#elif MYLAYERS_LEVEL == 1
INLINE u32 widen(u16 v) { return (u32)_mm256_cvtepu16_epi32((__m128i)v); }
INLINE u16 narrow(u32 v) { return __builtin_convertvector(v, u16); }
#else
INLINE u32 widen(u16 v) { return __builtin_convertvector(v, u32); }
INLINE u16 narrow(u32 v) { return __builtin_convertvector(v, u16); }
#endif

INLINE vec<float> load(const bfloat16_t* p) { return (vec<float>)(widen(load_bits<u16>(p)) << 16); }
// Round to nearest even; NaN becomes the quiet NaN that PyTorch writes.
INLINE u16 bfloat16_bits(vec<float> v) {
  const u32 bits = (u32)v;
  const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrow(v != v ? u32{} + 0x7fc0 : rounded);
}
INLINE void store(bfloat16_t* p, vec<float> v) {
  const u16 out = bfloat16_bits(v);
  std::memcpy(p, &out, sizeof(out));
}

#if MYLAYERS_LEVEL == 2
INLINE vec<float> load(const half_t* p) {
  return (vec<float>)_mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(p));
}
INLINE void store(half_t* p, vec<float> v) {
  const __m256i out =
      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &out, sizeof(out));
}
#elif MYLAYERS_LEVEL == 1
INLINE vec<float> load(const half_t* p) {
  return (vec<float>)_mm256_cvtph_ps(load_bits<__m128i>(p));
}
INLINE void store(half_t* p, vec<float> v) {
  const __m128i out = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &out, sizeof(out));
}
#else
// Without a conversion instruction: rebuild the number from its fields. Subnormal halves
// are integers times 2^-24; subtracting 0.5 from 0.5 + that integer's bits is exact.
INLINE vec<float> load(const half_t* p) {
  const u32 h = widen(load_bits<u16>(p));
  const u32 sign = (h & 0x8000) << 16;
  const u32 body = (h & 0x7fff) << 13;
  const u32 normal = body + (112u << 23);
  const u32 special = body | (255u << 23);
  const vec<float> offset = (vec<float>)((u32){} + (113u << 23));
  const u32 subnormal = (u32)((vec<float>)(body + (113u << 23)) - offset);
  const u32 is_special = (u32)(body >= (31u << 23));
  const u32 is_subnormal = (u32)(body < (1u << 23));
  return (vec<float>)(sign | (special & is_special) | (subnormal & is_subnormal) |
                      (normal & ~is_special & ~is_subnormal));
}
INLINE void store(half_t* p, vec<float> v) {
  const u32 bits = (u32)v;
  const u32 sign = (bits >> 16) & 0x8000;
  const u32 body = bits & 0x7fffffff;
  // Adding 0.5 lets the adder round a value below 2^-14 to a multiple of 2^-24.
  const vec<float> half = (vec<float>)((u32){} + (126u << 23));
  const u32 subnormal = (u32)((vec<float>)body + half) - (126u << 23);
  const u32 normal = (body - (112u << 23) + 0xfff + ((body >> 13) & 1)) >> 13;
  const u32 is_nan = (u32)(v != v);
  const u32 is_large = (u32)(body >= (143u << 23)) & ~is_nan;
  const u32 is_subnormal = (u32)(body < (113u << 23));
  const u32 out = (0x7e00 & is_nan) | (0x7c00 & is_large) | (subnormal & is_subnormal) |
                  (normal & ~is_nan & ~is_large & ~is_subnormal);
  const u16 lanes = narrow(sign | out);
  std::memcpy(p, &lanes, sizeof(lanes));
}
#endif

// The first n of a vector's lanes, n < kLanes; the others are zero, and nothing beyond
// the n values is touched.
template <class T>
INLINE vec<acc_t<T>> load_part(const T* p, int n) {
  T lanes[kLanes<acc_t<T>>] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
INLINE void store_part(T* p, vec<acc_t<T>> v, int n) {
  T lanes[kLanes<acc_t<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}
#if MYLAYERS_LEVEL == 2
template <>
INLINE vec<float> load_part(const float* p, int n) {
  return (vec<float>)_mm512_maskz_loadu_ps((1u << n) - 1, p);
}
template <>
INLINE void store_part(float* p, vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
}
template <>
INLINE vec<double> load_part(const double* p, int n) {
  return (vec<double>)_mm512_maskz_loadu_pd((1u << n) - 1, p);
}
template <>
INLINE void store_part(double* p, vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)v);
}
template <>
INLINE vec<float> load_part(const half_t* p, int n) {
  return (vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16((1u << n) - 1, p));
}
template <>
INLINE vec<float> load_part(const bfloat16_t* p, int n) {
  const u16 bits = (u16)_mm256_maskz_loadu_epi16((1u << n) - 1, p);
  return (vec<float>)(widen(bits) << 16);
}
template <>
INLINE void store_part(half_t* p, vec<float> v, int n) {
  half_t lanes[kLanes<float>];
  store(lanes, v);
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, load_bits<__m256i>(lanes));
}
template <>
INLINE void store_part(bfloat16_t* p, vec<float> v, int n) {
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)bfloat16_bits(v));
}
#elif MYLAYERS_LEVEL == 1
INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
INLINE vec<float> load_part(const float* p, int n) {
  return (vec<float>)_mm256_maskload_ps(p, first_lanes(n));
}
template <>
INLINE void store_part(float* p, vec<float> v, int n) {
  _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
}
INLINE __m256i first_doubles(int n) {
  return _mm256_cvtepi32_epi64(_mm256_castsi256_si128(first_lanes(n)));
}
template <>
INLINE vec<double> load_part(const double* p, int n) {
  return (vec<double>)_mm256_maskload_pd(p, first_doubles(n));
}
template <>
INLINE void store_part(double* p, vec<double> v, int n) {
  _mm256_maskstore_pd(p, first_doubles(n), (__m256d)v);
}
#endif

// n lanes, n <= kLanes; inlined into for_vectors, the choice is made at compile time.
template <class T>
INLINE vec<acc_t<T>> load_n(const T* p, int n) {
  return n == kLanes<acc_t<T>> ? load(p) : load_part(p, n);
}
template <class T>
INLINE void store_n(T* p, vec<acc_t<T>> v, int n) {
  n == kLanes<acc_t<T>> ? store(p, v) : store_part(p, v, n);
}

// Rounded to T and back.
template <class T>
INLINE vec<acc_t<T>> rounded(vec<acc_t<T>> v) {
  T lanes[kLanes<acc_t<T>>];
  store(lanes, v);
  return load(lanes);
}

// n values, `stride` apart; the other lanes are zero.
template <class T>
INLINE vec<acc_t<T>> load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) {
    return load_n(p, n);
  }
  T lanes[kLanes<acc_t<T>>] = {};
  for (int l = 0; l < n; ++l) {
    std::memcpy(lanes + l, p + l * stride, sizeof(T));
  }
  return load(lanes);
}

// body(j, n) for every vector of `count` elements: whole ones, kTogether at a time, then the rest,
// if any.
template <class C, int kTogether = 4, class Body>
INLINE void for_vectors(int64_t count, Body body) {
  constexpr int L = kLanes<C>;
  int64_t j = 0;
  if constexpr (kTogether == 4) {
    for (; j + 4 * L <= count; j += 4 * L) {
      body(j, L);
      body(j + L, L);
      body(j + 2 * L, L);
      body(j + 3 * L, L);
    }
  }
  _Pragma("GCC unroll 1") for (; j + L <= count; j += L) { body(j, L); }
  if (j < count) {
    body(j, static_cast<int>(count - j));
  }
}

// The same from the last vector to the first, one at a time: by four the prefetcher lost its
// track, and a subtraction in level-2 cache ran at 0.55 of its speed.
template <class C, class Body>
INLINE void for_vectors_down(int64_t count, Body body) {
  constexpr int L = kLanes<C>;
  int64_t j = count / L * L;
  if (j < count) {
    body(j, static_cast<int>(count - j));
  }
  _Pragma("GCC unroll 1") while (j > 0) {
    j -= L;
    body(j, L);
  }
}

#define BODY [&](int64_t j, int n) __attribute__((always_inline))

// ---- activations --------------------------------------------------------------------

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
    // PyTorch's formula, rounding where it rounds. Where e^-x overflows the result is 0.
    constexpr C kLargest = ExpConstants<C>::kLargest;
    vec<C> x = v > 40 ? vec<C>{} - 40 : -v;
    x = x > kLargest ? splat(kLargest) : x;
    const Exponential<C> e(x);
    return 1 / multiply_add<C>(e.power * (1 + e.p), splat<C>(2), splat<C>(1));
  } else if constexpr (kActivation == Activation::kElu) {
    return v < 0 ? expm1_of_negative<C>(v) : v;
  } else {
    return v;
  }
}

// act'(z) * g as a function of y = act(z), for the NaN and the zeros of y as PyTorch has it.
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
    case Activation::kRelu:
      return f(Constant<Activation::kRelu>{});
    case Activation::kTanh:
      return f(Constant<Activation::kTanh>{});
    case Activation::kSigmoid:
      return f(Constant<Activation::kSigmoid>{});
    case Activation::kElu:
      return f(Constant<Activation::kElu>{});
  }
}

template <class C>
INLINE vec<C> activate_in_tile(vec<C> v, Activation act) {
  return act == Activation::kRelu ? activated<Activation::kRelu, C>(v) : v;
}

template <class C>
void activate(int64_t m, int64_t n, C* c, int64_t c_row, Activation act) {
  if (n ==
      c_row) {  // whole vectors: a row of 8 floats waited for the one before, 32 x 8 took 0.8 us
    n *= m;
    m = 1;
  }
  with_activation(act, [&]<Activation kAct>(Constant<kAct>) {
    for (int64_t i = 0; i < m; ++i) {
      C* row = c + i * c_row;
      for_vectors<C>(n, BODY { store_n(row + j, activated<kAct, C>(load_n(row + j, n)), n); });
    }
  });
}

// ---- products -----------------------------------------------------------------------

constexpr int64_t kLine = 64;  // bytes that memory and caches move at once

// To the cache of a level. p + ahead may lie beyond the memory at hand.
template <int kLevel = 1, class T>
INLINE void prefetch(const T* p, int64_t ahead) {
  constexpr int kLocality = 4 - kLevel;
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + sizeof(T) * ahead), 0,
      kLocality);
}

// kVectors vectors, which may lie on two lines: 1024 x 256 x 256 took 1.1 times as long with the
// first alone.
template <int kVectors, int kLevel = 1, class T>
INLINE void prefetch_row(const T* p, int64_t ahead) {
  constexpr int64_t kValues = kVectors * kLanes<acc_t<T>>;
  prefetch<kLevel>(p, ahead);
  if constexpr (kValues * sizeof(T) > kLine) {
    prefetch<kLevel>(p, ahead + kValues - 1);
  }
}

// The kSteps rows below as many of b.
template <int kSteps, int kVectors, int kLevel = 2, class T>
INLINE void prefetch_rows_below(const T* b, int64_t b_row) {
  UNROLL
  for (int s = kSteps; s < 2 * kSteps; ++s) {
    prefetch_row<kVectors, kLevel>(b, s * b_row);
  }
}

// Rows of b that a tile which copies them asks for ahead of its step; 8 to 32 do alike.
constexpr int64_t kAhead = 16;
// Bytes by which a transposed b is asked for ahead: 256 and 1024 gained less.
constexpr int64_t kAheadInRow = 512;

// The rows of a below those of a tile: a line of them is asked for at each step, so that the next
// tile need not wait where a comes from memory. 16384 x 256 x 256 took 1.1 times as long.
template <int kRows>
class RowsBelow {
 public:
  INLINE RowsBelow(const void* a, int64_t row_bytes)
      : at_(reinterpret_cast<uintptr_t>(a) + kRows * row_bytes), row_bytes_(row_bytes) {}
  INLINE void ask() {
    __builtin_prefetch(reinterpret_cast<const void*>(at_));
    at_ += row_bytes_;
    if (++row_ == kRows) {
      row_ = 0;
      at_ += kLine - kRows * row_bytes_;
    }
  }

 private:
  uintptr_t at_;
  int64_t row_bytes_;
  int row_ = 0;
};

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
        sum[i][v] = activate_in_tile<C>(bias ? sum[i][v] + add : sum[i][v], act);
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
#if MYLAYERS_LEVEL > 0
    case 3:
      return tail ? Tiles<C, 3, true>::kByRows : Tiles<C, 3, false>::kByRows;
#endif
#if MYLAYERS_LEVEL == 2
    case 4:
      return tail ? Tiles<C, 4, true>::kByRows : Tiles<C, 4, false>::kByRows;
#endif
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

// kVectors vectors of kSteps rows of b; whole ones but for the last, of which there are `lanes`.
// Those that are used again stay in registers: g++ 12 made them operands in memory of every
// multiply-add. Those that are not are read further ahead without an instruction of their own.
template <bool kAgain, int kSteps, int kVectors, class T, class C = acc_t<T>>
INLINE void load_rows(const T* b, int64_t b_row, int lanes, vec<C> (&row)[kSteps][kVectors]) {
  constexpr int L = kLanes<C>;
  UNROLL
  for (int s = 0; s < kSteps; ++s) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      row[s][v] = load_n(b + s * b_row + v * L, v + 1 < kVectors ? L : lanes);
      if constexpr (kAgain) {
        row[s][v] = in_register(row[s][v]);
      }
    }
  }
}

// sums (kRows, columns of row) += a (kRows, kSteps) @ row, of as many columns as load_rows loaded.
template <int kRows, class C, int kSteps, int kVectors>
INLINE void add_products(
    const C* a, int64_t a_row, const vec<C> (&row)[kSteps][kVectors], C* sums, int64_t sums_row,
    bool accumulate, int lanes) {
  constexpr int L = kLanes<C>;
  vec<C> sum[kRows][kVectors];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const C* from = sums + i * sums_row + v * L;
      sum[i][v] = accumulate ? load_n(from, v + 1 < kVectors ? L : lanes) : vec<C>{};
    }
  }
  UNROLL
  for (int s = 0; s < kSteps; ++s) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const C x = a[i * a_row + s];
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = multiply_add<C>(splat(x), row[s][v], sum[i][v]);
      }
    }
  }
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store_n(sums + i * sums_row + v * L, sum[i][v], v + 1 < kVectors ? L : lanes);
    }
  }
}

// c (kRows, columns) += x (kRows, kSteps) @ b, for kVectors vectors of columns.
template <class T, int kRows, int kSteps, int kVectors, class C = acc_t<T>>
INLINE void stream_middle(const C* x, const T* b, int64_t b_row, C* c, int64_t c_row, int lanes) {
  vec<C> row[kSteps][kVectors];
  load_rows<(kRows > 1)>(b, b_row, lanes, row);
  add_products<kRows>(x, kSteps, row, c, c_row, true, lanes);
}

// One pass of stream: c (kRows, n) = act(c0 + a (kRows, kSteps) @ b (kSteps, n) + bias).
template <class T, int kRows, int kSteps, class C = acc_t<T>>
void stream_pass(
    int64_t n, const C* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, Source source,
    C* c, int64_t c_row, bool accumulate, bool finish, const C* bias, Activation act) {
  C x[kRows * kSteps];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int s = 0; s < kSteps; ++s) {
      x[i * kSteps + s] = load_bits<C>(a + i * a_row + s * a_col);
    }
  }
  // A pass between the first and the last has nothing to decide for each vector: 4 rows of
  // 1024 x 1024 took 1.1 to 1.2 times as long with the loop below. Of one row two vectors are read
  // of each row of b: 1 x 4096 x 4096 took 1.03 to 1.05 times as long by one in float16 and
  // float32.
  if (accumulate && !finish) {
    constexpr int L = kLanes<C>;
    constexpr int kVectors = kRows == 1 ? 2 : 1;
    int64_t j = 0;
    _Pragma("GCC unroll 1") for (; j + kVectors * L <= n; j += kVectors * L) {
      if (source == Source::kMemoryByLevel2) {
        prefetch_rows_below<kSteps, kVectors>(b + j, b_row);
      }
      stream_middle<T, kRows, kSteps, kVectors>(x, b + j, b_row, c + j, c_row, L);
    }
    for (; j < n; j += L) {
      stream_middle<T, kRows, kSteps, 1>(
          x, b + j, b_row, c + j, c_row, static_cast<int>(n - j < L ? n - j : L));
    }
    return;
  }
  // One vector at a time: by four the prefetcher lost track of b, and 1 x 4096 x 4096 took 1.06 to
  // 1.22 of the time, 256 x 8 x 1024, which has no other pass, 1.06.
  const auto pass = [&]<bool kPlain>(std::bool_constant<kPlain>) __attribute__((always_inline)) {
    for_vectors<C, 1>(
        n, BODY {
          vec<C> row[kSteps];
          UNROLL
          for (int s = 0; s < kSteps; ++s) {
            row[s] = load_n(b + s * b_row + j, n);
          }
          UNROLL
          for (int i = 0; i < kRows; ++i) {
            C* out = c + i * c_row + j;
            vec<C> sum = !kPlain && accumulate ? load_n(out, n) : vec<C>{};
            UNROLL
            for (int s = 0; s < kSteps; ++s) {
              sum = multiply_add<C>(splat(x[i * kSteps + s]), row[s], sum);
            }
            if (!kPlain && finish) {
              sum = activate_in_tile<C>(bias ? sum + load_n(bias + j, n) : sum, act);
            }
            store_n(out, sum, n);
          }
        });
  };
  if (!accumulate && (!finish || (!bias && act != Activation::kRelu))) {
    pass(std::true_type{});
  } else {
    pass(std::false_type{});
  }
}

template <class T, class C = acc_t<T>>
using StreamPass = void (*)(
    int64_t, const C*, int64_t, int64_t, const T*, int64_t, Source, C*, int64_t, bool, bool,
    const C*, Activation);

template <class T, int kRows, int kSteps = kStreamDepth>
StreamPass<T> stream_pass_of(int64_t steps) {
  if constexpr (kSteps > 1) {
    if (steps < kSteps) {
      return stream_pass_of<T, kRows, sizeof(T) == 2 ? kSteps / 2 : kSteps - 1>(steps);
    }
  }
  return stream_pass<T, kRows, kSteps>;
}

// The products of a few rows of a with a few rows of b at a time, along all of n. Memory is read
// and written in long runs, where tiles would touch short pieces of many rows. The sums are kept in
// c meanwhile. The prefetcher follows four rows of b best, eight of float16; more sums, or a
// product that is over after kStreamDepth rows, rather touch c less often. From memory six: every
// store of a sum waits for the lines of b that it adds, and a core waits with so many stores only.
// 1 x 4096 x 4096 by four took 1.03 to 1.18 of the time, 2 x 4096 x 4096 1.15 to 1.2; from a cache,
// on one thread, 2 x 1024 x 1024 by six took 1.03. Of an outer product, or two, long rows are
// written one after another: four at a time took 1.1 to 1.45 of the time from 256 columns on, and
// half of it at 64.
template <class T, class C = acc_t<T>>
void stream(
    int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, int64_t a_col, const T* b,
    int64_t b_row, Source source, C* c, int64_t c_row, bool accumulate, bool finish, const C* bias,
    Activation act) {
  constexpr StreamPass<T> (*by_rows[kStreamRows])(int64_t) = {
      stream_pass_of<T, 1>, stream_pass_of<T, 2>, stream_pass_of<T, 3>, stream_pass_of<T, 4>};
  const int64_t together = k <= 2 && n >= 256 ? 1 : kStreamRows;
  for (int64_t i = 0; i < m; i += together) {
    const int64_t rows = m - i < together ? m - i : together;
    const bool deep = rows > 2 || k <= kStreamDepth || sizeof(T) == 2;
    const int64_t most = deep ? kStreamDepth : source == Source::kCache ? 4 : 6;
    for (int64_t p = 0, steps = 0; p < k; p += steps) {
      steps = k - p < most ? k - p : most;
      if constexpr (sizeof(T) == 2) {  // the last few in passes of 4, 2 and 1: half the code
        steps = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(steps)));
      }
      by_rows[rows - 1](steps)(
          n, a + i * a_row + p * a_col, a_row, a_col, b + p * b_row, b_row, source, c + i * c_row,
          c_row, accumulate || p > 0, finish && p + steps == k, bias, act);
    }
    if (finish && !fits_in_tile(act)) {
      activate(rows, n, c + i * c_row, c_row, act);
    }
  }
}

// kSteps steps of stream_many, for kVectors vectors of columns.
template <class T, int kSteps, int kVectors, class C = acc_t<T>>
INLINE void stream_columns(
    int64_t m, const C* a, int64_t a_row, const T* b, int64_t b_row, C* sums, int64_t sums_row,
    bool accumulate, int lanes) {
  vec<C> row[kSteps][kVectors];
  load_rows<true>(b, b_row, lanes, row);
  int64_t i = 0;
  for (; i + kManyTogether <= m; i += kManyTogether) {
    add_products<kManyTogether>(
        a + i * a_row, a_row, row, sums + i * sums_row, sums_row, accumulate, lanes);
  }
  if (i < m) {
    add_products<1>(a + i * a_row, a_row, row, sums + i * sums_row, sums_row, accumulate, lanes);
  }
}

template <class T, int kSteps, class C = acc_t<T>>
void stream_many_pass(
    int64_t m, int64_t n, const C* a, int64_t a_row, const T* b, int64_t b_row, Source source,
    C* sums, int64_t sums_row, bool accumulate) {
  constexpr int L = kLanes<C>;
  int64_t j = 0;
  for (; j + kManyVectors * L <= n; j += kManyVectors * L) {
    if (source == Source::kMemoryByLevel2) {
      prefetch_rows_below<kSteps, kManyVectors>(b + j, b_row);
    }
    stream_columns<T, kSteps, kManyVectors>(
        m, a, a_row, b + j, b_row, sums + j, sums_row, accumulate, L);
  }
  for (; j < n; j += L) {
    stream_columns<T, kSteps, 1>(
        m, a, a_row, b + j, b_row, sums + j, sums_row, accumulate,
        static_cast<int>(n - j < L ? n - j : L));
  }
}

// As stream, where more rows share what is read: a vector of b serves them all, and is widened
// once.
template <class T, class C = acc_t<T>>
void stream_many(
    int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, const T* b, int64_t b_row,
    Source source, C* sums, int64_t sums_row, bool accumulate) {
  constexpr auto passes = []<int... kStep>(std::integer_sequence<int, kStep...>) {
    return std::array{stream_many_pass<T, kStep + 1>...};
  }(std::make_integer_sequence<int, kManySteps>{});
  for (int64_t p = 0; p < k; p += kManySteps) {
    passes[(k - p < kManySteps ? k - p : kManySteps) - 1](
        m, n, a + p, a_row, b + p * b_row, b_row, source, sums, sums_row, accumulate || p > 0);
  }
}

// Rows of the next tile of as few and as equal ones as `left` rows make: 16 rows in 6, 5 and 5 take
// 0.95 of the time of 6, 6 and 4.
constexpr int64_t next_height(int64_t left, int64_t most) {
  const int64_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

// Vectors of most strips of k rows that m rows multiply. As many rows as one tile of a vector less
// can take read b once: 8 x 256 x 256 took 1.06 times as long in two of AVX-512's usual tiles, 7 x
// 1024 x 1024 1.45. Where sums of few terms are stored often, strips are to be of whole lines:
// 256 x 32 x 256 took 1.2 times as long in three vectors of AVX2 as in two.
INLINE int usual_vectors(int64_t m, int64_t k) {
  const bool one_tile = kTileVectors > 2 && m > kTileRows && m <= tile_rows(kTileVectors - 1);
  const bool short_sums = kTileVectors == 3 && k <= 32;
  return one_tile || short_sums ? kTileVectors - 1 : kTileVectors;
}

// Columns of the next strip of `left` columns. Four vectors are two and two where three are the
// most, since a tile of one needs a load for each multiply-add.
template <class C>
INLINE int64_t next_width(int64_t left, int64_t m, int64_t k) {
  constexpr int64_t L = kLanes<C>;
  const int64_t vectors = kTileVectors == 3 && (left + L - 1) / L == 4 ? 2 : usual_vectors(m, k);
  return left < vectors * L ? left : vectors * L;
}

template <class C>
void block(
    int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, int64_t a_col, bool first,
    const C* b, int64_t b_row, bool in_strips, C* c, int64_t c_row, bool accumulate, bool finish,
    const C* bias, Activation act, Copies<C> copies) {
  constexpr int L = kLanes<C>;
  const bool activates_after = finish && !fits_in_tile(act);
  for (int64_t j = 0, cols = 0; j < n; j += cols) {
    cols = next_width<C>(n - j, m, k);
    const int tail = static_cast<int>(cols % L);
    const int vectors = static_cast<int>((cols + L - 1) / L);
    // The copy of a is one of tiles of the usual height.
    const int most = tile_rows(copies.a ? usual_vectors(m, k) : vectors);
    const Tile<C>* usual = tiles<C>(vectors, tail != 0);
    const bool reads_a = first && j == 0;
    const bool copies_b = copies.b && tail == 0 && vectors >= kLeastCopied && m > most;
    const C* strip = b + (in_strips ? j * k : j);
    int64_t strip_row = in_strips ? vectors * L : b_row, rows = 0;
    for (int64_t i = 0; i < m; i += rows) {
      rows = next_height(m - i, most);
      const bool below = i + rows < m;
      C* kept = copies.a ? copies.a + i * k : nullptr;
      const bool fills_a = kept && reads_a, fills_b = copies_b && i == 0;
      const Tile<C>* by_rows =
          fills_a || fills_b ? copying_tiles<C>(vectors, fills_a, fills_b) : usual;
      const bool from_kept = kept && !reads_a;
      by_rows[rows - 1](
          k, from_kept ? kept : a + i * a_row, from_kept ? 1 : a_row, from_kept ? rows : a_col,
          reads_a && a_col == 1 && below, strip, strip_row, c + i * c_row + j, c_row,
          kCopies && below, tail, accumulate, finish, bias ? bias + j : nullptr, act,
          {kept, copies.b});
      if (activates_after) {
        activate(rows, cols, c + i * c_row + j, c_row, act);
      }
      if (fills_b) {
        strip = copies.b;
        strip_row = cols;
      }
    }
  }
}

// ---- packing ------------------------------------------------------------------------

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

// Half a vector from p, then half a vector from q, any of whose bits are kept.
template <class C>
INLINE vec<C> load_halves(const void* p, const void* q) {
#if MYLAYERS_LEVEL == 2
  const __m512d first = _mm512_castpd256_pd512(_mm256_loadu_pd(static_cast<const double*>(p)));
  return (vec<C>)_mm512_insertf64x4(first, _mm256_loadu_pd(static_cast<const double*>(q)), 1);
#elif MYLAYERS_LEVEL == 1
  const __m256d first = _mm256_castpd128_pd256(_mm_loadu_pd(static_cast<const double*>(p)));
  return (vec<C>)_mm256_insertf128_pd(first, _mm_loadu_pd(static_cast<const double*>(q)), 1);
#else
  vec<C> v;
  std::memcpy(&v, p, kBytes / 2);
  std::memcpy(reinterpret_cast<char*>(&v) + kBytes / 2, q, kBytes / 2);
  return v;
#endif
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

// The same from memory, row l at row(l): loads join the halves, which saves a quarter to a third of
// the shuffles.
template <class C, class Row>
INLINE void load_transposed(vec<C> (&r)[kLanes<C>], Row row) {
  transpose_halves<C>(r, [&](int l, int m, int h) __attribute__((always_inline)) {
    return load_halves<C>(row(l) + h * (kLanes<C> / 2), row(m) + h * (kLanes<C> / 2));
  });
}

template <class T>
INLINE acc_t<T> widen(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return load_part(p, 1)[0];
  } else {
    return load_bits<T>(p);
  }
}

// Out is T (a plain copy) or acc_t<T>.
template <class T, class Out>
void pack(
    int64_t rows, int64_t cols, const T* in, int64_t in_row, int64_t in_col, Out* out,
    int64_t out_row) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  if (in_col == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      Out* to = out + i * out_row;
      const T* from = in + i * in_row;
      for_vectors<C>(cols, BODY { store_n(to + j, load_n(from + j, n), n); });
      for (int64_t z = cols; z < out_row; ++z) {
        to[z] = Out{};
      }
    }
    return;
  }
  for (int64_t c = 0; c < out_row; c += L) {
    const int width = static_cast<int>(out_row - c < L ? out_row - c : L);
    for (int64_t r = 0; r < rows; r += L) {
      const int height = static_cast<int>(rows - r < L ? rows - r : L);
      vec<C> square[L];
      if (in_row == 1 && height == L && c + L <= cols) {  // whole, in one piece without branches
        const auto column = [&](int l) { return in + r + (c + l) * in_col; };
        if constexpr (std::is_same_v<T, C>) {
          load_transposed<C>(square, column);
        } else {
          UNROLL
          for (int l = 0; l < L; ++l) {
            square[l] = load(column(l));
          }
          transpose<C>(square);
        }
        UNROLL
        for (int l = 0; l < L; ++l) {
          store(out + (r + l) * out_row + c, square[l]);
        }
        continue;
      }
      UNROLL
      for (int l = 0; l < L; ++l) {
        const T* from = in + r * in_row + (c + l) * in_col;
        square[l] = c + l >= cols ? vec<C>{} : load_strided(from, in_row, height);
      }
      transpose<C>(square);
      UNROLL
      for (int l = 0; l < L; ++l) {
        if (l < height) {
          store_n(out + (r + l) * out_row + c, square[l], width);
        }
      }
    }
  }
}

template <class T>
void pack_strips(
    int64_t rows, int64_t cols, const T* in, int64_t in_row, int64_t in_col, int64_t m,
    acc_t<T>* out) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  const auto pack_all =
      [&]<int kVectors>(std::integral_constant<int, kVectors>) __attribute__((always_inline)) {
        constexpr int64_t kStrip = kVectors * L;
        int64_t whole = 0;
        while (next_width<C>(cols - whole, m, rows) == kStrip) {
          whole += kStrip;
        }
        if (in_col != 1) {
          for (int64_t j = 0; j < whole; j += kStrip) {
            pack<T, C>(rows, kStrip, in + j * in_col, in_row, in_col, out + j * rows, kStrip);
          }
          return whole;
        }
        for (int64_t i = 0; i < rows; ++i) {  // all at once: memory is read in longer runs
          for (int64_t j = 0; j < whole; j += kStrip) {
            UNROLL
            for (int v = 0; v < kVectors; ++v) {
              store(out + j * rows + i * kStrip + v * L, load(in + i * in_row + j + v * L));
            }
          }
        }
        return whole;
      };
  const int64_t whole = usual_vectors(m, rows) == kTileVectors
                            ? pack_all(std::integral_constant<int, kTileVectors>{})
                            : pack_all(std::integral_constant<int, kTileVectors - 1>{});
  for (int64_t j = whole, width = 0; j < cols; j += width) {
    width = next_width<C>(cols - j, m, rows);
    pack<T, C>(
        rows, width, in + j * in_col, in_row, in_col, out + j * rows, (width + L - 1) / L * L);
  }
}

// c = act(a (kRows, k) @ b (k, n) + bias) for kGroups vectors of columns, whole ones, or for one
// that n cuts, of a and a transposed b with unit strides along k. Squares of b are transposed in
// registers and used at once, one read of b being all that few rows of a pay for; the sums stay in
// registers over the whole depth. From memory (kFar) its lines are asked for ahead: 4 x 4096 x 4096
// took 1.23 times as long without, 1 x 5000 x 3000 1.39 times.
template <class C, int kRows, int kGroups, bool kWhole, bool kFar>
INLINE void transposed_columns(
    int64_t n, int64_t k, const C* a, int64_t a_row, const C* b, int64_t b_col, Source source, C* c,
    int64_t c_row, const C* bias, Activation act) {
  constexpr int L = kLanes<C>;
  constexpr int kSquares = 64 / kBytes;  // in a row of lines, which are used up once they are there
  // Beyond n the last column again. Offsets serve all groups; as many pointers would not stay in
  // registers.
  int64_t offsets[L];
  UNROLL
  for (int l = 0; l < L; ++l) {
    offsets[l] = (kWhole || l < n ? l : n - 1) * b_col;
  }
  vec<C> sum[kGroups][kRows] = {};
  const auto add_square =
      [&]<int kSteps>(std::integer_sequence<int, kSteps>, int g, int64_t p, int steps)
          __attribute__((always_inline)) {
            const C* first = b + g * L * b_col + p;
            vec<C> square[L];
            if constexpr (kSteps == L) {
              load_transposed<C>(square, [&](int l) { return first + offsets[l]; });
            } else {
              UNROLL
              for (int l = 0; l < L; ++l) {
                square[l] = load_part(first + offsets[l], steps);
              }
              transpose<C>(square);
            }
            UNROLL
            for (int s = 0; s < kSteps; ++s) {
              if (s < steps) {
                UNROLL
                for (int i = 0; i < kRows; ++i) {
                  const C x = load_bits<C>(a + i * a_row + p + s);
                  sum[g][i] = multiply_add<C>(splat(x), square[s], sum[g][i]);
                }
              }
            }
          };
  // How many steps a square has at most: what the compiler is not told, it warns about.
  constexpr std::integer_sequence<int, L> whole;
  constexpr std::integer_sequence<int, L - 1> part;
  int64_t p = 0;
  for (; p + kSquares * L <= k; p += kSquares * L) {
    UNROLL
    for (int g = 0; g < kGroups; ++g) {
      if constexpr (kFar) {
        UNROLL
        for (int l = 0; l < L; ++l) {
          const C* row = b + g * L * b_col + p + offsets[l];
          if (source == Source::kMemoryByLevel2) {
            prefetch<2>(row, kAheadInRow / sizeof(C));
          } else {
            prefetch(row, kAheadInRow / sizeof(C));
          }
        }
      }
      UNROLL
      for (int q = 0; q < kSquares; ++q) {
        add_square(whole, g, p + q * L, L);
      }
    }
  }
  for (; p + L <= k; p += L) {
    UNROLL
    for (int g = 0; g < kGroups; ++g) {
      add_square(whole, g, p, L);
    }
  }
  if (const int rest = static_cast<int>(k % L); rest > 0) {
    UNROLL
    for (int g = 0; g < kGroups; ++g) {
      add_square(part, g, p, rest);
    }
  }
  const int lanes = kWhole || n > L ? L : static_cast<int>(n);
  UNROLL
  for (int g = 0; g < kGroups; ++g) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const vec<C> out = bias ? sum[g][i] + load_n(bias + g * L, lanes) : sum[g][i];
      store_n(c + i * c_row + g * L, activate_in_tile<C>(out, act), lanes);
    }
  }
}

// A sum waits for its last multiply-add, so one or two rows take two vectors of columns, unless
// these lie in the same sets of the caches: 1 x 256 x 256 ran 1.25 times as fast so, 2 x 256 x
// 256 1.2 times, but 1 x 1024 x 1024 at 0.8 of its speed.
template <class C, int kRows, bool kFar>
void stream_transposed(
    int64_t n, int64_t k, const C* a, int64_t a_row, const C* b, int64_t b_col, Source source, C* c,
    int64_t c_row, const C* bias, Activation act) {
  constexpr int L = kLanes<C>;
  constexpr int kGroups = kRows <= 2 ? 2 : 1;
  const bool collide = b_col * static_cast<int64_t>(sizeof(C)) % 4096 == 0;
  int64_t j = 0;
  const auto next = [&]<int kMany, bool kWhole>(
                        std::integer_sequence<int, kMany>, std::bool_constant<kWhole>) {
    transposed_columns<C, kRows, kMany, kWhole, kFar>(
        n - j, k, a, a_row, b + j * b_col, b_col, source, c + j, c_row, bias ? bias + j : nullptr,
        act);
    j += kMany * L;
  };
  while (!collide && j + kGroups * L <= n) {
    next(std::integer_sequence<int, kGroups>{}, std::true_type{});
  }
  while (j + L <= n) {
    next(std::integer_sequence<int, 1>{}, std::true_type{});
  }
  if (j < n) {
    next(std::integer_sequence<int, 1>{}, std::false_type{});
  }
}

template <class C>
void transposed(
    int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, const C* b, int64_t b_col,
    Source source, C* c, int64_t c_row, const C* bias, Activation act) {
  constexpr decltype(&stream_transposed<C, 1, false>) by_rows[2][kStreamRows] = {
      {stream_transposed<C, 1, false>, stream_transposed<C, 2, false>,
       stream_transposed<C, 3, false>, stream_transposed<C, 4, false>},
      {stream_transposed<C, 1, true>, stream_transposed<C, 2, true>, stream_transposed<C, 3, true>,
       stream_transposed<C, 4, true>}};
  by_rows[source != Source::kCache][m - 1](n, k, a, a_row, b, b_col, source, c, c_row, bias, act);
  if (!fits_in_tile(act)) {
    activate(m, n, c, c_row, act);
  }
}

// Pairs (even[c], odd[c]), the first n of kLanes columns; zeros for an odd that is null.
INLINE void store_pairs(
    bfloat16_t* out, const bfloat16_t* even, const bfloat16_t* odd, int64_t stride, int n) {
  const vec<float> x = load_strided(even, stride, n);
  const vec<float> y = odd ? load_strided(odd, stride, n) : vec<float>{};
  const u32 pairs = ((u32)x >> 16) | (u32)y;
  std::memcpy(out, &pairs, sizeof(pairs));
}

// Columns from `first` to `width` of one row of pairs, and zeros up to a multiple of 16.
INLINE void pack_pair_row(
    const bfloat16_t* even, const bfloat16_t* odd, int64_t stride, int64_t first, int64_t width,
    bfloat16_t* pairs) {
  constexpr int L = kLanes<float>;
  for (int64_t j = first; j < (width + 15) / 16 * 16; j += L) {
    const int n = static_cast<int>(width - j < 0 ? 0 : width - j < L ? width - j : L);
    const int64_t at = j * stride;
    store_pairs(pairs + 2 * j, even + at, odd ? odd + at : nullptr, stride, n);
  }
}

#if MYLAYERS_LEVEL == 2
// Pairs of two rows: the first 16 of 32 columns, then the others.
alignas(64) constexpr uint16_t kInterleave[2][32] = {
    {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
    {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
INLINE __m512i interleave(__m512i even, __m512i odd, int half) {
  return _mm512_permutex2var_epi16(even, _mm512_load_si512(kInterleave[half]), odd);
}
#endif

// The same of a whole panel with unit stride.
INLINE void pack_whole_pair_row(const bfloat16_t* even, const bfloat16_t* odd, bfloat16_t* pairs) {
#if MYLAYERS_LEVEL == 2
  UNROLL
  for (int64_t j = 0; j < kPanel; j += 32) {
    const __m512i x = _mm512_loadu_si512(even + j), y = _mm512_loadu_si512(odd + j);
    _mm512_storeu_si512(pairs + 2 * j, interleave(x, y, 0));
    _mm512_storeu_si512(pairs + 2 * j + 32, interleave(x, y, 1));
  }
#else
  UNROLL
  for (int64_t j = 0; j < kPanel; j += kLanes<float>) {
    store_pairs(pairs + 2 * j, even + j, odd + j, 1, kLanes<float>);
  }
#endif
}

// Two rows of b side by side, as the processor's 16-bit multiply-adds want them. Memory is read in
// long runs, four whole rows at a time or whole columns, the rows below being asked for meanwhile:
// 4096 x 4096 took 1.3 ms so, 1.9 without asking and 2.3 two rows at a time, on one thread.
void pack_pairs(
    int64_t rows, int64_t cols, const bfloat16_t* in, int64_t in_row, int64_t in_col,
    bfloat16_t* out, int64_t panel_size) {
  constexpr int L = kLanes<float>;
  constexpr int64_t out_row = 2 * kPanel, kBand = 4;
  if (in_row != 1 || in_col == 1) {
    for (int64_t r = 0; r < rows; r += kBand) {
      for (int64_t c = 0; c < cols; c += kPanel) {
        const int64_t width = cols - c < kPanel ? cols - c : kPanel;
        bfloat16_t* panel = out + c / kPanel * panel_size;
        for (int64_t i = r; i < rows && i < r + kBand; i += 2) {
          const bfloat16_t* even = in + i * in_row + c * in_col;
          const bfloat16_t* odd = i + 1 < rows ? even + in_row : nullptr;
          bfloat16_t* pairs = panel + i / 2 * out_row;
          if (in_col == 1 && odd && width == kPanel) {
            UNROLL
            for (int64_t j = 0; j < kPanel; j += 32) {
              prefetch(even + j, kBand * in_row);
              prefetch(odd + j, kBand * in_row);
            }
            pack_whole_pair_row(even, odd, pairs);
          } else {
            pack_pair_row(even, odd, in_col, 0, width, pairs);
          }
        }
      }
    }
    return;
  }
  const int64_t whole = rows / (2 * L) * (2 * L);
  for (int64_t c = 0; c < cols; c += kPanel) {
    const int64_t width = cols - c < kPanel ? cols - c : kPanel, squares = width / L * L;
    const bfloat16_t* from = in + c * in_col;
    bfloat16_t* to = out + c / kPanel * panel_size;
    // Pairs lie side by side already, down the columns: transpose them as 32-bit units.
    for (int64_t j = 0; j < squares; j += L) {
      for (int64_t r = 0; r < whole; r += 2 * L) {
        vec<float> square[L];
        load_transposed<float>(square, [&](int l) {
          return reinterpret_cast<const float*>(from + r + (j + l) * in_col);
        });
        UNROLL
        for (int l = 0; l < L; ++l) {
          std::memcpy(to + (r / 2 + l) * out_row + 2 * j, &square[l], sizeof(square[l]));
        }
      }
    }
    for (int64_t r = squares == kPanel ? whole : 0; r < rows; r += 2) {
      pack_pair_row(
          from + r, r + 1 < rows ? from + r + 1 : nullptr, in_col, r < whole ? squares : 0, width,
          to + r / 2 * out_row);
    }
  }
}

#if MYLAYERS_LEVEL == 2
MYLAYERS_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16")

// bfloat16_bits of two vectors, by the processor's own conversion where it agrees: it takes
// subnormal numbers for zero and keeps the sign and payload of a NaN.
INLINE __m512i two_rounded(__m512 first, __m512 second) {
  constexpr int kNaNOrSubnormal = 0x01 | 0x20 | 0x80;  // quiet NaN, subnormal, signalling NaN
  const __mmask16 other = _mm512_fpclass_ps_mask(first, kNaNOrSubnormal) |
                          _mm512_fpclass_ps_mask(second, kNaNOrSubnormal);
  if (__builtin_expect(other != 0, false)) {
    return _mm512_inserti64x4(
        _mm512_castsi256_si512((__m256i)bfloat16_bits((vec<float>)first)),
        (__m256i)bfloat16_bits((vec<float>)second), 1);
  }
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

// As tile, of pairs: a panel of b as pack_pairs makes it, sums in rows of kPanel. The last call of
// a sum that writes out rounds it to bfloat16.
template <int kRows, int kVectors>
void pair_tile(
    int64_t pairs, const bfloat16_t* a, int64_t a_row, bool more_rows, const bfloat16_t* b,
    float* sums, bool accumulate, int64_t cols, const bfloat16_t* bias, Activation act,
    bfloat16_t* out, int64_t out_row) {
  constexpr int L = kLanes<float>;
  RowsBelow<kRows> below(a, a_row * static_cast<int64_t>(sizeof(bfloat16_t)));
  __m512 sum[kRows][kVectors];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = accumulate ? _mm512_loadu_ps(sums + i * kPanel + v * L) : _mm512_setzero_ps();
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    if (more_rows) {
      below.ask();
    }
    __m512i row[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      row[v] = _mm512_loadu_si512(b + 2 * v * L);
    }
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512i x = _mm512_set1_epi32(load_bits<int>(a + i * a_row));
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)x, (__m512bh)row[v]);
      }
    }
    a += 2;
    b += 2 * kPanel;
  }
  if (!out) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        _mm512_storeu_ps(sums + i * kPanel + v * L, sum[i][v]);
      }
    }
    return;
  }
  UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const int n = static_cast<int>(cols - v * L < L ? cols - v * L : L);
    const vec<float> add = bias ? load_n(bias + v * L, n) : vec<float>{};
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const vec<float> total = (vec<float>)sum[i][v];
      sum[i][v] = (__m512)activate_in_tile<float>(bias ? total + add : total, act);
    }
  }
  UNROLL
  for (int v = 0; v < kVectors; v += 2) {
    const int64_t left = cols - v * L;
    const uint32_t lanes = left < 2 * L ? (1u << left) - 1 : ~0u;
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512 second = v + 1 < kVectors ? sum[i][v + 1] : _mm512_setzero_ps();
      _mm512_mask_storeu_epi16(out + i * out_row + v * L, lanes, two_rounded(sum[i][v], second));
    }
  }
}

template <int kVectors>
void pair_panel(
    int64_t m, int64_t cols, int64_t pairs, const bfloat16_t* a, int64_t a_row, bool first_panel,
    const bfloat16_t* b, float* sums, bool accumulate, const bfloat16_t* bias, Activation act,
    bfloat16_t* out, int64_t out_row) {
  constexpr decltype(&pair_tile<1, kVectors>) by_rows[kTileRows] = {
      pair_tile<1, kVectors>, pair_tile<2, kVectors>, pair_tile<3, kVectors>,
      pair_tile<4, kVectors>, pair_tile<5, kVectors>, pair_tile<6, kVectors>};
  int64_t rows = 0;
  for (int64_t i = 0; i < m; i += rows) {
    rows = next_height(m - i, kTileRows);
    by_rows[rows - 1](
        pairs, a + i * a_row, a_row, first_panel && i + rows < m, b, sums + i * kPanel, accumulate,
        cols, bias, act, out ? out + i * out_row : nullptr, out_row);
  }
}

void pair_block(
    int64_t m, int64_t cols, int64_t pairs, const bfloat16_t* a, int64_t a_row, bool first_panel,
    const bfloat16_t* b, float* sums, bool accumulate, const bfloat16_t* bias, Activation act,
    bfloat16_t* out, int64_t out_row) {
  constexpr decltype(&pair_panel<1>) by_vectors[kTileVectors] = {
      pair_panel<1>, pair_panel<2>, pair_panel<3>, pair_panel<4>};
  by_vectors[(cols - 1) / kLanes<float>](
      m, cols, pairs, a, a_row, first_panel, b, sums, accumulate, bias, act, out, out_row);
}

// The pairs of two rows, of the first of 32 columns and of the others; zeros where a mask has none.
INLINE void load_pairs(
    __m512bh (&pairs)[2], const bfloat16_t* even, int64_t b_row, uint32_t in_even,
    uint32_t in_odd) {
  const __m512i top = _mm512_maskz_loadu_epi16(in_even, even);
  const __m512i bottom = _mm512_maskz_loadu_epi16(in_odd, even + b_row);
  UNROLL
  for (int h = 0; h < 2; ++h) {
    pairs[h] = (__m512bh)in_register(interleave(top, bottom, h));
  }
}

// One pass of pair_stream: c (kRows, n) = c0 + a (kRows, 2 * kPairs) @ b (2 * kPairs, n), whose
// last row may be missing.
template <int kRows, int kPairs>
void pair_stream_pass(
    int64_t n, const bfloat16_t* a, int64_t a_row, const bfloat16_t* b, int64_t b_row, bool whole,
    Source source, float* c, int64_t c_row, bool accumulate) {
  __m512bh x[kRows][kPairs];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int s = 0; s < kPairs; ++s) {
      x[i][s] = (__m512bh)_mm512_set1_epi32(load_bits<int>(a + i * a_row + 2 * s));
    }
  }
  for (int64_t j = 0; j < n; j += 32) {
    const uint32_t columns = n - j < 32 ? (1u << (n - j)) - 1 : ~0u;
    const __mmask16 halves[2] = {
        static_cast<__mmask16>(columns), static_cast<__mmask16>(columns >> 16)};
    if (source == Source::kMemoryByLevel2) {
      prefetch_rows_below<2 * kPairs, 2>(b + j, b_row);
    }
    __m512 sum[kRows][2];
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      UNROLL
      for (int h = 0; h < 2; ++h) {
        sum[i][h] = accumulate ? _mm512_maskz_loadu_ps(halves[h], c + i * c_row + j + 16 * h)
                               : _mm512_setzero_ps();
      }
    }
    UNROLL
    for (int s = 0; s < kPairs; ++s) {
      __m512bh pairs[2];
      load_pairs(
          pairs, b + 2 * s * b_row + j, b_row, columns, s + 1 < kPairs || whole ? columns : 0);
      UNROLL
      for (int h = 0; h < 2; ++h) {
        UNROLL
        for (int i = 0; i < kRows; ++i) {
          sum[i][h] = _mm512_dpbf16_ps(sum[i][h], x[i][s], pairs[h]);
        }
      }
    }
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      UNROLL
      for (int h = 0; h < 2; ++h) {
        _mm512_mask_storeu_ps(c + i * c_row + j + 16 * h, halves[h], sum[i][h]);
      }
    }
  }
}

template <int kRows>
void pair_stream_rows(
    int64_t n, int64_t k, const bfloat16_t* a, int64_t a_row, const bfloat16_t* b, int64_t b_row,
    Source source, float* c, int64_t c_row) {
  constexpr int kMost = kStreamDepth / 2;
  constexpr decltype(&pair_stream_pass<kRows, 1>) by_pairs[kMost] = {
      pair_stream_pass<kRows, 1>, pair_stream_pass<kRows, 2>, pair_stream_pass<kRows, 3>,
      pair_stream_pass<kRows, 4>};
  for (int64_t p = 0; p < k; p += 2 * kMost) {
    const int64_t steps = k - p < 2 * kMost ? k - p : 2 * kMost;
    by_pairs[(steps + 1) / 2 - 1](
        n, a + p, a_row, b + p * b_row, b_row, steps % 2 == 0, source, c, c_row, p > 0);
  }
}

void pair_stream(
    int64_t m, int64_t n, int64_t k, const bfloat16_t* a, int64_t a_row, const bfloat16_t* b,
    int64_t b_row, Source source, float* c, int64_t c_row) {
  constexpr decltype(&pair_stream_rows<1>) by_rows[kStreamRows] = {
      pair_stream_rows<1>, pair_stream_rows<2>, pair_stream_rows<3>, pair_stream_rows<4>};
  by_rows[m - 1](n, k, a, a_row, b, b_row, source, c, c_row);
}

// As add_products, of pairs, for 32 columns less those that a mask leaves out.
template <int kRows, int kPairs>
INLINE void add_pairs(
    const bfloat16_t* a, int64_t a_row, const __m512bh (&pairs)[kPairs][2], float* sums,
    int64_t sums_row, bool accumulate, const __mmask16 (&halves)[2]) {
  __m512 sum[kRows][2];
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
      sum[i][h] = accumulate ? _mm512_maskz_loadu_ps(halves[h], sums + i * sums_row + 16 * h)
                             : _mm512_setzero_ps();
    }
  }
  UNROLL
  for (int s = 0; s < kPairs; ++s) {
    UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512i x = _mm512_set1_epi32(load_bits<int>(a + i * a_row + 2 * s));
      UNROLL
      for (int h = 0; h < 2; ++h) {
        sum[i][h] = _mm512_dpbf16_ps(sum[i][h], (__m512bh)x, pairs[s][h]);
      }
    }
  }
  UNROLL
  for (int i = 0; i < kRows; ++i) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
      _mm512_mask_storeu_ps(sums + i * sums_row + 16 * h, halves[h], sum[i][h]);
    }
  }
}

// One pass of pair_stream_many, to sums (m, n), over 2 * kPairs rows of b, whose last may be
// missing.
template <int kPairs>
void pair_stream_many_pass(
    int64_t m, int64_t n, const bfloat16_t* a, int64_t a_row, const bfloat16_t* b, int64_t b_row,
    bool whole, Source source, float* sums, int64_t sums_row, bool accumulate) {
  for (int64_t j = 0; j < n; j += 32) {
    const uint32_t columns = n - j < 32 ? (1u << (n - j)) - 1 : ~0u;
    const __mmask16 halves[2] = {
        static_cast<__mmask16>(columns), static_cast<__mmask16>(columns >> 16)};
    __m512bh pairs[kPairs][2];
    UNROLL
    for (int s = 0; s < kPairs; ++s) {
      load_pairs(
          pairs[s], b + 2 * s * b_row + j, b_row, columns, s + 1 < kPairs || whole ? columns : 0);
    }
    if (source == Source::kMemoryByLevel2) {
      prefetch_rows_below<2 * kPairs, 2>(b + j, b_row);
    } else if (source == Source::kMemory) {
      prefetch_rows_below<2 * kPairs, 2, 1>(b + j, b_row);
    }
    int64_t i = 0;
    for (; i + 2 <= m; i += 2) {
      add_pairs<2>(
          a + i * a_row, a_row, pairs, sums + i * sums_row + j, sums_row, accumulate, halves);
    }
    if (i < m) {
      add_pairs<1>(
          a + i * a_row, a_row, pairs, sums + i * sums_row + j, sums_row, accumulate, halves);
    }
  }
}

// Sixteen rows of b at a time, twice those of stream_many, since a multiply-add takes two. Of
// memory the prefetcher alone does not follow so many: 16 x 4096 x 4096 took 2.6 to 4.5 ms, and 1.9
// with the rows below asked for, which costs a tenth where a cache holds them.
void pair_stream_many(
    int64_t m, int64_t n, int64_t k, const bfloat16_t* a, int64_t a_row, const bfloat16_t* b,
    int64_t b_row, Source source, float* sums, int64_t sums_row) {
  constexpr auto passes = []<int... kPair>(std::integer_sequence<int, kPair...>) {
    return std::array{pair_stream_many_pass<kPair + 1>...};
  }(std::make_integer_sequence<int, kStreamDepth>{});
  constexpr int64_t kMost = 2 * kStreamDepth;
  for (int64_t p = 0; p < k; p += kMost) {
    const int64_t steps = k - p < kMost ? k - p : kMost;
    passes[(steps + 1) / 2 - 1](
        m, n, a + p, a_row, b + p * b_row, b_row, steps % 2 == 0,
        k - p > kMost ? source : Source::kCache, sums, sums_row, p > 0);
  }
}

#include "kernels/amx-inl.h"

MYLAYERS_TARGET_END
constexpr PairKernels kPairs = {
    pack<bfloat16_t, bfloat16_t>, pack_pairs, pair_block, pair_stream, pair_stream_many};
#else
constexpr PairKernels kPairs = {
    pack<bfloat16_t, bfloat16_t>, pack_pairs, nullptr, nullptr, nullptr};
#if defined(MYLAYERS_TILE_MODEL)  // as tests have it
#include "kernels/amx-inl.h"
#else
constexpr AmxKernels kAmx = {};
#endif
#endif

template <class T>
void finish(
    int64_t rows, int64_t cols, const acc_t<T>* in, int64_t in_row, const T* bias, Activation act,
    T* out, int64_t out_row) {
  using C = acc_t<T>;
  with_activation(act, [&]<Activation kAct>(Constant<kAct>) {
    for (int64_t i = 0; i < rows; ++i) {
      for_vectors<C>(
          cols, BODY {
            vec<C> v = load_n(in + i * in_row + j, n);
            if (bias) {
              v += load_n(bias + j, n);
            }
            store_n(out + i * out_row + j, activated<kAct, C>(v), n);
          });
    }
  });
}

template <class T>
void mask(
    int64_t rows, int64_t cols, const T* dy, int64_t dy_row, const T* y, Activation act, T* dz,
    acc_t<T>* db) {
  using C = acc_t<T>;
  with_activation(act, [&]<Activation kAct>(Constant<kAct>) {
    for (int64_t i = 0; i < rows; ++i) {
      for_vectors<C>(
          cols, BODY {
            vec<C> g = load_n(dy + i * dy_row + j, n);
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

// ---- means --------------------------------------------------------------------------

typedef float half_width __attribute__((vector_size(kBytes / 2)));
using Doubles = vec<double>;
constexpr int kDoubles = kLanes<double>;

INLINE double sum_lanes(Doubles v) {
  double s = 0;
  for (int l = 0; l < kDoubles; ++l) {
    s += v[l];
  }
  return s;
}

#if MYLAYERS_LEVEL == 2
INLINE Doubles widen(half_width v) { return (Doubles)_mm512_maskz_cvtps_pd(0xff, (__m256)v); }
#elif MYLAYERS_LEVEL == 1
INLINE Doubles widen(half_width v) { return (Doubles)_mm256_cvtps_pd((__m128)v); }
#else
INLINE Doubles widen(half_width v) { return __builtin_convertvector(v, Doubles); }
#endif

// parts[0] (and parts[1], for float) += v, widened: half of a float vector fills a double one.
INLINE void add_wide(Doubles* parts, vec<double> v) { parts[0] += v; }
INLINE void add_wide(Doubles* parts, vec<float> v) {
  half_width halves[2];
  std::memcpy(halves, &v, sizeof(v));
  parts[0] += widen(halves[0]);
  parts[1] += widen(halves[1]);
}

// Eight vectors are added in their own type, as a tree, then widened: three roundings that no
// length adds to, where widening every vector first made the sum slower than memory (0.8 of
// PyTorch's speed at 2^18 values on one thread).
template <class T>
double sum(int64_t count, const T* x) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  Doubles parts[2] = {};
  int64_t done = 0;
  for (; done + 8 * L <= count; done += 8 * L) {
    const T* p = x + done;
    const vec<C> low = (load(p) + load(p + L)) + (load(p + 2 * L) + load(p + 3 * L));
    p += 4 * L;
    const vec<C> high = (load(p) + load(p + L)) + (load(p + 2 * L) + load(p + 3 * L));
    add_wide(parts, low + high);
  }
  for_vectors<C>(count - done, BODY { add_wide(parts, load_n(x + done + j, n)); });
  return sum_lanes(parts[0] + parts[1]);
}

// How a subtraction writes. It goes downwards: the pass of the sums went upwards, and what it has
// read last is still in cache. Against upwards: 1.18 of the speed at 2^20 values on two threads,
// 1.06 to 1.14 at 2^16 to 2^19 on one, 0.94 to 0.97 above 2^20 on one. It goes upwards where many
// slices that fit in cache follow each other: downwards in each, the prefetcher starts anew at
// every turn, and (4096, 1000) ran at 0.8 of the speed. Below AVX-512 the last is as kDown.
enum class Way { kUp, kDown, kDownPastCaches };

#if MYLAYERS_LEVEL == 2
// A whole vector, to an address that is a multiple of its size.
template <class T>
INLINE void store_past_caches(T* p, vec<acc_t<T>> v) {
  T lanes[kLanes<acc_t<T>>];
  store(lanes, v);
  if constexpr (sizeof(lanes) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), load_bits<__m512i>(lanes));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), load_bits<__m256i>(lanes));
  }
}
#endif

// out = value(j, n) for every vector of `count` elements.
template <class T, Way kWay, class Value>
INLINE void write_vectors(int64_t count, T* out, Value value) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  if constexpr (kWay == Way::kDownPastCaches && MYLAYERS_LEVEL == 2) {
    for_vectors_down<C>(
        count, BODY {
          n == L ? store_past_caches(out + j, value(j, n)) : store_n(out + j, value(j, n), n);
        });
  } else if constexpr (kWay == Way::kUp) {
    for_vectors<C>(count, BODY { store_n(out + j, value(j, n), n); });
  } else {
    for_vectors_down<C>(count, BODY { store_n(out + j, value(j, n), n); });
  }
}

// Other threads can read all that was written after their next barrier.
template <Way kWay>
INLINE void finish_writing() {
#if MYLAYERS_LEVEL == 2
  if constexpr (kWay == Way::kDownPastCaches) {
    _mm_sfence();
  }
#endif
}

template <class T, Way kWay>
void subtract_in(int64_t count, const T* x, double mean, T* out) {
  // x - x.mean() subtracts a mean of x's own dtype.
  const vec<acc_t<T>> m = rounded<T>(splat(static_cast<acc_t<T>>(mean)));
  write_vectors<T, kWay>(count, out, BODY { return load_n(x + j, n) - m; });
  finish_writing<kWay>();
}

template <class T>
void subtract(int64_t count, const T* x, double mean, T* out, bool past_caches) {
  (past_caches ? subtract_in<T, Way::kDownPastCaches> : subtract_in<T, Way::kDown>)(count, x, mean,
                                                                                    out);
}

// Runs shorter than a vector, in blocks of many: their values are summed one after another, and
// subtracted in vectors across the ends of runs.
template <class T>
void center_short_runs(int64_t runs, int64_t count, const T* x, T* out) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  constexpr int64_t kBlock = 64;
  C values[kBlock * L];
  C means[(kBlock + 1) * L];
  double sums[kBlock];
  for (int64_t r = 0; r < runs; r += kBlock) {
    const int64_t block = runs - r < kBlock ? runs - r : kBlock, size = block * count;
    for_vectors<C>(size, BODY { store_n(values + j, load_n(x + j, n), n); });
    for (int64_t i = 0; i < block; ++i) {
      double total = 0;
      for (int64_t j = 0; j < count; ++j) {
        total += static_cast<double>(values[i * count + j]);
      }
      sums[i] = total;
    }
    for (int64_t i = 0; i < block; ++i) {
      const C mean = static_cast<C>(sums[i] / static_cast<double>(count));
      store(means + i * count, splat(mean));  // the next run's mean overwrites the excess
    }
    for_vectors<C>(
        size,
        BODY { store_n(out + j, load_n(values + j, n) - rounded<T>(load_n(means + j, n)), n); });
    x += size;
    out += size;
  }
}

template <class T>
void center_runs(int64_t runs, int64_t count, const T* x, T* out) {
  if (count < kLanes<acc_t<T>>) {
    center_short_runs(runs, count, x, out);
    return;
  }
  for (int64_t r = 0; r < runs; ++r, x += count, out += count) {
    const double mean = sum(count, x) / static_cast<double>(count);
    subtract_in<T, Way::kUp>(count, x, mean, out);
  }
}

// Rows up to this wide, one after another in memory, are read in vectors across their ends.
constexpr int64_t kNarrow = 64;

// Eight rows, an eighth of the chunk apart, are added in C and then widened, for the reason that
// `sum` has; up to seven rows are left, which are widened one by one.
template <class T>
void column_sums(int64_t rows, int64_t cols, const T* x, int64_t x_row, double* sums) {
  using C = acc_t<T>;
  constexpr int D = kDoubles;
  const int64_t groups = rows / 8, apart = groups * x_row, added = rows - 7 * groups;
  const auto eight = [&](const T* p, int n) __attribute__((always_inline)) {
    const vec<C> low = (load_n(p, n) + load_n(p + apart, n)) +
                       (load_n(p + 2 * apart, n) + load_n(p + 3 * apart, n));
    p += 4 * apart;
    const vec<C> high = (load_n(p, n) + load_n(p + apart, n)) +
                        (load_n(p + 2 * apart, n) + load_n(p + 3 * apart, n));
    return low + high;
  };
  const auto put = [&](int64_t j, const Doubles* parts, int n) __attribute__((always_inline)) {
    for (int part = 0; part * D < n; ++part) {
      store_n(sums + j + part * D, parts[part], n - part * D < D ? n - part * D : D);
    }
  };
  if (groups == 0) {
    for_vectors<C>(
        cols, BODY {
          Doubles parts[2] = {};
          for (int64_t i = 0; i < rows; ++i) {
            add_wide(parts, load_n(x + i * x_row + j, n));
          }
          put(j, parts, n);
        });
    return;
  }
  if (cols <= kNarrow && cols == x_row) {
    C wide[(kColumnChunk / 8 + 7) * kNarrow];
    for_vectors<C>(apart, BODY { store_n(wide + j, eight(x + j, n), n); });
    for_vectors<C>((rows - 8 * groups) * cols, BODY {
      store_n(wide + apart + j, load_n(x + 8 * apart + j, n), n);
    });
    for_vectors<C>(
        cols, BODY {
          Doubles parts[2] = {};
          for (int64_t i = 0; i < added; ++i) {
            add_wide(parts, load_n(wide + i * cols + j, n));
          }
          put(j, parts, n);
        });
    return;
  }
  for (int64_t j = 0; j < cols; ++j) {
    sums[j] = 0;
  }
  const auto add = [&](int64_t j, vec<C> v, int n) __attribute__((always_inline)) {
    Doubles parts[2] = {};
    add_wide(parts, v);
    for (int part = 0; part * D < n; ++part) {
      parts[part] += load_n(sums + j + part * D, n - part * D < D ? n - part * D : D);
    }
    put(j, parts, n);
  };
  for (int64_t i = 0; i < groups; ++i) {
    for_vectors<C>(cols, BODY { add(j, eight(x + i * x_row + j, n), n); });
  }
  for (int64_t i = 8 * groups; i < rows; ++i) {
    for_vectors<C>(cols, BODY { add(j, load_n(x + i * x_row + j, n), n); });
  }
}

template <class T, Way kWay>
void subtract_columns_in(
    int64_t rows, int64_t cols, const T* x, int64_t x_row, const double* sums, int64_t count,
    T* out) {
  using C = acc_t<T>;
  constexpr int L = kLanes<C>;
  C mean[kStrip];
  for (int64_t j = 0; j < cols; ++j) {
    mean[j] = static_cast<C>(sums[j] / static_cast<double>(count));
  }
  for_vectors<C>(cols, BODY { store_n(mean + j, rounded<T>(load_n(mean + j, n)), n); });
  if (cols <= kNarrow && cols == x_row) {
    // The means of L rows, or of fewer, are a whole number of vectors.
    int64_t repeats = L;
    for (; repeats / 2 * cols >= 4 * L && repeats / 2 * cols % L == 0; repeats /= 2) {
    }
    const int64_t size = rows * cols, block = repeats * cols;
    for (int64_t j = cols; j < (rows < repeats ? size : block); ++j) {
      mean[j] = mean[j - cols];
    }
    static_assert(L * kNarrow <= kStrip);
    const int64_t blocks = (size + block - 1) / block;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = (kWay == Way::kUp ? b : blocks - 1 - b) * block;
      write_vectors<T, kWay>(
          size - at < block ? size - at : block, out + at,
          BODY { return load_n(x + at + j, n) - load_n(mean + j, n); });
    }
    finish_writing<kWay>();
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (kWay == Way::kUp ? i : rows - 1 - i) * x_row;
    write_vectors<T, kWay>(
        cols, out + at, BODY { return load_n(x + at + j, n) - load_n(mean + j, n); });
  }
  finish_writing<kWay>();
}

template <class T>
void subtract_columns(
    int64_t rows, int64_t cols, const T* x, int64_t x_row, const double* sums, int64_t count,
    T* out, bool past_caches) {
  (past_caches ? subtract_columns_in<T, Way::kDownPastCaches>
               : subtract_columns_in<T, Way::kDown>)(rows, cols, x, x_row, sums, count, out);
}

// Values of a slice up to which its columns are subtracted from upwards too.
constexpr int64_t kSmallSlice = 1 << 15;

template <class T>
void center_columns(
    int64_t slices, int64_t rows, int64_t cols, const T* x, int64_t x_row, T* out,
    bool past_caches) {
  for (int64_t s = 0; s < slices; ++s, x += rows * x_row, out += rows * x_row) {
    double total[kStrip], chunk[kStrip];
    for (int64_t i = 0; i < rows; i += kColumnChunk) {
      column_sums(
          rows - i < kColumnChunk ? rows - i : kColumnChunk, cols, x + i * x_row, x_row,
          i == 0 ? total : chunk);
      for (int64_t j = 0; i > 0 && j < cols; ++j) {
        total[j] += chunk[j];
      }
    }
    if (rows * cols <= kSmallSlice && !past_caches) {
      subtract_columns_in<T, Way::kUp>(rows, cols, x, x_row, total, rows, out);
    } else {
      subtract_columns(rows, cols, x, x_row, total, rows, out, past_caches);
    }
  }
}

template <class T>
constexpr StorageKernels<T> kStorage = {
    pack<T, acc_t<T>>,
    pack_strips<T>,
    stream<T>,
    stream_many<T>,
    finish<T>,
    mask<T>,
    sum<T>,
    subtract<T>,
    center_runs<T>,
    column_sums<T>,
    subtract_columns<T>,
    center_columns<T>};

constexpr Kernels kTable = {
    MYLAYERS_STRING(MYLAYERS_ISA),
    kTunedFor,
    kTuning,
    {kTileRows, kTileVectors * kLanes<float>, block<float>, transposed<float>},
    {kTileRows, kTileVectors * kLanes<double>, block<double>, transposed<double>},
    kStorage<float>,
    kStorage<double>,
    kStorage<half_t>,
    kStorage<bfloat16_t>,
    kPairs,
    kAmx,
};

}  // namespace
}  // namespace mylayers::cpu::MYLAYERS_ISA

#if MYLAYERS_LEVEL > 0
MYLAYERS_TARGET_END
#endif

// Tests compile the few functions that they call.
#if !defined(MYLAYERS_WITHOUT_TABLE)
namespace mylayers::cpu {
const Kernels& MYLAYERS_CONCAT(MYLAYERS_ISA, _kernels)() { return MYLAYERS_ISA::kTable; }
}  // namespace mylayers::cpu
#endif
