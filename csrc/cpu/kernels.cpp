#include "kernels/kernels.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mylayers::cpu {
namespace {

#if defined(__x86_64__)
// Of an AMD processor. Not by sysconf, which on a virtual machine of two cores gave 320 MiB for 32.
int64_t level3_bytes() {
  unsigned type = 0, lines = 0, sets = 0, flags = 0;
  if (__get_cpuid_count(0x8000001d, 3, &type, &lines, &sets, &flags) == 0) {
    return 0;
  }
  const int64_t line = (lines & 0xfff) + 1, partitions = (lines >> 12 & 0x3ff) + 1;
  return line * partitions * ((lines >> 22) + 1) * (int64_t{sets} + 1);
}
#endif

#if defined(__x86_64__)
// Golden Cove and its successors with AVX-512 (Sapphire Rapids, Emerald Rapids and later): by the
// instructions that came with it, as compilers do not know all of their models.
bool is_golden_cove() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAvx512Fp16 = 1u << 23;
  return __builtin_cpu_is("intel") && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 &&
         (d & kAvx512Fp16) != 0;
}
#endif

const Kernels& choose() {
#if defined(__aarch64__)
  return neon_kernels();
#else
#if defined(__x86_64__)
  // PyTorch's own variable, so that one setting lowers both libraries alike.
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  const bool only_generic = cap && std::strcmp(cap, "default") == 0;
  const bool no_avx512 = only_generic || (cap && std::strcmp(cap, "avx2") == 0);
  if (!no_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    // Zen 4, alone of its family to have AVX-512: it took 1.13 to 1.26 times as long for one row of
    // 4096 x 4096 or 5000 x 3000 in float32 without asking, 1.1 to 1.6 times of a weight (out, in),
    // asked into level 1, and 1.11 to 1.18 times for 16 rows in bfloat16, where a Zen 5 takes 1.04.
    if (__builtin_cpu_is("amdfam19h")) {
      static const Kernels zen4 = [] {
        Kernels changed = avx512_kernels();
        changed.tuned_for = "Zen 4";
        changed.tuning.memory = Source::kMemoryByLevel2;
        changed.tuning.level3 = level3_bytes();
        return changed;
      }();
      return zen4;
    }
    if (is_golden_cove()) {
      static const Kernels golden_cove = [] {
        Kernels changed = avx512_kernels();
        changed.tuned_for = "Golden Cove";
        changed.tuning.near = 48;
        changed.tuning.bands = 32;
        changed.tuning.flat = 64;
        return changed;
      }();
      return golden_cove;
    }
    return avx512_kernels();
  }
  // AVX2 never comes without F16C, which clang 14 cannot be asked about.
  if (!only_generic && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2_kernels();
  }
#endif
  return generic_kernels();
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace mylayers::cpu
