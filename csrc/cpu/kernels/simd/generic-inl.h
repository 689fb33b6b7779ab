// Vectors of 16 bytes in GCC's and clang's own terms, for any processor.

constexpr int kBytes = 16;
constexpr int kRegisters = 16;  // x86-64's; some have more
constexpr int kSums = 12;
constexpr bool kFuses = false;
constexpr bool kCopies = true;

#include "types-inl.h"

template <class C>
INLINE vec<C> add_in_order(vec<C> a, vec<C> b) {
#if defined(__x86_64__)
  if constexpr (sizeof(C) == 4) {
    asm("addps %1, %0" : "+x"(a) : "x"(b));
  } else {
    asm("addpd %1, %0" : "+x"(a) : "x"(b));
  }
  return a;
#else
  return a + b;
#endif
}

template <class C>
INLINE vec<C> multiply_add(vec<C> a, vec<C> b, vec<C> c) {
  return add_in_order<C>(c, a * b);
}

template <class V>
INLINE V in_register(V v) {
  return v;
}

INLINE u32 widen(u16 v) { return __builtin_convertvector(v, u32); }
INLINE u16 narrow(u32 v) { return __builtin_convertvector(v, u16); }
INLINE Doubles widen(half_width v) { return __builtin_convertvector(v, Doubles); }

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

template <class C>
INLINE vec<C> load_halves(const void* p, const void* q) {
  vec<C> v;
  std::memcpy(&v, p, kBytes / 2);
  std::memcpy(reinterpret_cast<char*>(&v) + kBytes / 2, q, kBytes / 2);
  return v;
}
