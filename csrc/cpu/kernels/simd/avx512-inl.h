// AVX-512 (F, BW, VL, DQ).

constexpr int kBytes = 64;
constexpr int kRegisters = 32;
constexpr int kSums = 24;
constexpr bool kFuses = true;
constexpr bool kCopies = false;
#define MYLAYERS_HAS_STREAMING_STORES
#define MYLAYERS_HAS_PACK_WHOLE_VNNI_ROW
#define MYLAYERS_HAS_AVX512_BF16 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16"

#include "types-inl.h"

template <class C>
INLINE vec<C> multiply_add(vec<C> a, vec<C> b, vec<C> c) {
  if constexpr (sizeof(C) == 4) {
    return (vec<C>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else {
    return (vec<C>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
}

template <class C>
INLINE vec<C> add_in_order(vec<C> a, vec<C> b) {
  vec<C> sum;
  if constexpr (sizeof(C) == 4) {
    asm("vaddps %2, %1, %0" : "=v"(sum) : "v"(a), "vm"(b));
  } else {
    asm("vaddpd %2, %1, %0" : "=v"(sum) : "v"(a), "vm"(b));
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
INLINE u32 widen(u16 v) { return (u32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v); }
INLINE u16 narrow(u32 v) { return (u16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v); }
INLINE Doubles widen(half_width v) { return (Doubles)_mm512_maskz_cvtps_pd(0xff, (__m256)v); }

INLINE vec<float> load(const half_t* p) {
  return (vec<float>)_mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(p));
}
INLINE void store(half_t* p, vec<float> v) {
  const __m256i out =
      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &out, sizeof(out));
}

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

template <class C>
INLINE vec<C> load_halves(const void* p, const void* q) {
  const __m512d first = _mm512_castpd256_pd512(_mm256_loadu_pd(static_cast<const double*>(p)));
  return (vec<C>)_mm512_insertf64x4(first, _mm256_loadu_pd(static_cast<const double*>(q)), 1);
}

// Pairs of two rows: the first 16 of 32 columns, then the others.
alignas(64) constexpr uint16_t kInterleave[2][32] = {
    {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
    {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
INLINE __m512i interleave(__m512i even, __m512i odd, int half) {
  return _mm512_permutex2var_epi16(even, _mm512_load_si512(kInterleave[half]), odd);
}

INLINE void pack_whole_vnni_row(const bfloat16_t* even, const bfloat16_t* odd, bfloat16_t* pairs) {
  UNROLL
  for (int64_t j = 0; j < kPanel; j += 32) {
    const __m512i x = _mm512_loadu_si512(even + j), y = _mm512_loadu_si512(odd + j);
    _mm512_storeu_si512(pairs + 2 * j, interleave(x, y, 0));
    _mm512_storeu_si512(pairs + 2 * j + 32, interleave(x, y, 1));
  }
}

// A whole vector, to an address that is a multiple of its size.
template <class T>
INLINE void store_non_temporal(T* p, vec<acc_t<T>> v) {
  T lanes[kLanes<acc_t<T>>];
  store(lanes, v);
  if constexpr (sizeof(lanes) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), load_bits<__m512i>(lanes));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), load_bits<__m256i>(lanes));
  }
}
// Other threads can read all that was written so after their next barrier.
INLINE void fence_non_temporal_stores() { _mm_sfence(); }
