// Vectors of kBytes: loads and stores of every storage type, whole and in part.

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
