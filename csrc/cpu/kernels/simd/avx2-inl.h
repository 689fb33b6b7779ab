// AVX2, FMA and F16C.

constexpr int kBytes = 32;
constexpr int kRegisters = 16;
constexpr int kSums = 12;
constexpr bool kFuses = true;
constexpr bool kCopies = true;

#include "types-inl.h"

template <class C>
INLINE vec<C> multiply_add(vec<C> a, vec<C> b, vec<C> c) {
  if constexpr (sizeof(C) == 4) {
    return (vec<C>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else {
    return (vec<C>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
}

template <class C>
INLINE vec<C> add_in_order(vec<C> a, vec<C> b) {
  vec<C> sum;
  if constexpr (sizeof(C) == 4) {
    asm("vaddps %2, %1, %0" : "=x"(sum) : "x"(a), "xm"(b));
  } else {
    asm("vaddpd %2, %1, %0" : "=x"(sum) : "x"(a), "xm"(b));
  }
  return sum;
}

template <class V>
INLINE V in_register(V v) {
  asm("" : "+v"(v));
  return v;
}

// Intrinsics, as g++ 12 cuts __builtin_convertvector into halves: bfloat16 sums then ran at half
// their speed.
INLINE u32 widen(u16 v) { return (u32)_mm256_cvtepu16_epi32((__m128i)v); }
INLINE u16 narrow(u32 v) { return __builtin_convertvector(v, u16); }
INLINE Doubles widen(half_width v) { return (Doubles)_mm256_cvtps_pd((__m128)v); }

INLINE vec<float> load(const half_t* p) {
  return (vec<float>)_mm256_cvtph_ps(load_bits<__m128i>(p));
}
INLINE void store(half_t* p, vec<float> v) {
  const __m128i out = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &out, sizeof(out));
}

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

template <class C>
INLINE vec<C> load_halves(const void* p, const void* q) {
  const __m256d first = _mm256_castpd128_pd256(_mm_loadu_pd(static_cast<const double*>(p)));
  return (vec<C>)_mm256_insertf128_pd(first, _mm_loadu_pd(static_cast<const double*>(q)), 1);
}
