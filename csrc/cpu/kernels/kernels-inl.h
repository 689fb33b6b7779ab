// Body of kernels_*.cpp: see kernels.h for what each function computes.
//
// The target pragma stands after the last #include and everything below lives in a
// namespace of its own, so no inline function of another header is ever compiled for an
// instruction set that the processor at hand may lack.

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

#define MYLAYERS_CONCAT_(a, b) a##b
#define MYLAYERS_CONCAT(a, b) MYLAYERS_CONCAT_(a, b)
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

#if defined(MYLAYERS_INSTRUCTIONS)
MYLAYERS_TARGET(MYLAYERS_INSTRUCTIONS)
#endif

namespace mylayers::cpu::MYLAYERS_ISA {
namespace {

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// In this order, as each uses those before it.
// clang-format off
// simd/avx2-inl.h and its like.
#include MYLAYERS_STRING(simd/MYLAYERS_ISA-inl.h)
#include "blocking-inl.h"
#include "vector-inl.h"
#include "loops-inl.h"
#include "exp-inl.h"
#include "normal-inl.h"
#include "activation-inl.h"
#include "prefetch-inl.h"
#include "gemm_microkernel-inl.h"
#include "skinny-inl.h"
#include "gemm_macrokernel-inl.h"
#include "transpose-inl.h"
#include "pack-inl.h"
#include "skinny_transposed-inl.h"
#include "pack_vnni-inl.h"

#if defined(MYLAYERS_HAS_AVX512_BF16)
MYLAYERS_TARGET(MYLAYERS_HAS_AVX512_BF16)

#include "bf16_avx512-inl.h"
#include "amx-inl.h"

MYLAYERS_TARGET_END
constexpr VnniKernels kVnni = {
    pack<bfloat16_t, bfloat16_t>, pack_vnni, vnni_macrokernel, vnni_skinny, vnni_skinny_many};
#else
constexpr VnniKernels kVnni = {
    pack<bfloat16_t, bfloat16_t>, pack_vnni, nullptr, nullptr, nullptr};
#if defined(MYLAYERS_TILE_MODEL)  // as tests have it
#include "amx-inl.h"
#else
constexpr AmxKernels kAmx = {};
#endif
#endif

#include "epilogue-inl.h"
#include "mean-inl.h"
#include "layer_norm-inl.h"
#include "optimizers-inl.h"
#include "table-inl.h"
// clang-format on

}  // namespace
}  // namespace mylayers::cpu::MYLAYERS_ISA

#if defined(MYLAYERS_INSTRUCTIONS)
MYLAYERS_TARGET_END
#endif

// Tests compile the few functions that they call.
#if !defined(MYLAYERS_WITHOUT_TABLE)
namespace mylayers::cpu {
const Kernels& MYLAYERS_CONCAT(MYLAYERS_ISA, _kernels)() { return MYLAYERS_ISA::kTable; }
}  // namespace mylayers::cpu
#endif
