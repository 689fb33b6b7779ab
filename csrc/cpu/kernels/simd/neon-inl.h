// Advanced SIMD of 64-bit Arm, which every such processor has.

constexpr int kBytes = 16;
constexpr int kRegisters = 32;
// A multiply-add takes an element of a from a register, not from memory, and g++ 12 loads those of
// all rows first: of 24 sums two went to memory and back in every step.
constexpr int kSums = 20;
constexpr bool kFuses = true;
constexpr bool kCopies = false;

#include "types-inl.h"

template <class C>
INLINE vec<C> multiply_add(vec<C> a, vec<C> b, vec<C> c) {
  if constexpr (sizeof(C) == 4) {
    return (vec<C>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  } else {
    return (vec<C>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  }
}

template <class C>
INLINE vec<C> add_in_order(vec<C> a, vec<C> b) {
  vec<C> sum;
  if constexpr (sizeof(C) == 4) {
    asm("fadd %0.4s, %1.4s, %2.4s" : "=w"(sum) : "w"(a), "w"(b));
  } else {
    asm("fadd %0.2d, %1.2d, %2.2d" : "=w"(sum) : "w"(a), "w"(b));
  }
  return sum;
}

template <class V>
INLINE V in_register(V v) {
  asm("" : "+w"(v));
  return v;
}

INLINE u32 widen(u16 v) { return (u32)vmovl_u16((uint16x4_t)v); }
INLINE u16 narrow(u32 v) { return (u16)vmovn_u32((uint32x4_t)v); }
INLINE Doubles widen(half_width v) { return (Doubles)vcvt_f64_f32((float32x2_t)v); }

INLINE vec<float> load(const half_t* p) {
  return (vec<float>)vcvt_f32_f16(load_bits<float16x4_t>(p));
}
INLINE void store(half_t* p, vec<float> v) {
  const float16x4_t out = vcvt_f16_f32((float32x4_t)v);
  std::memcpy(p, &out, sizeof(out));
}

template <class C>
INLINE vec<C> load_halves(const void* p, const void* q) {
  return (vec<C>)vcombine_u8(load_bits<uint8x8_t>(p), load_bits<uint8x8_t>(q));
}
