// Which row of the table this processor is, what of it the process may use, and its kernels.
#include "tuning.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <string_view>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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

// Golden Cove and its successors with AVX-512 (Sapphire Rapids, Emerald Rapids and later): by the
// instructions that came with it, as compilers do not know all of their models.
bool is_golden_cove() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAvx512Fp16 = 1u << 23;
  return __builtin_cpu_is("intel") && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 &&
         (d & kAvx512Fp16) != 0;
}

// Whether this process may use AMX's tiles, which it asks Linux for once for all its threads.
bool may_use_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTiles) == 0) {
    return false;
  }
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const char* avx512_row() {
  // Zen 4, alone of its family to have AVX-512.
  return __builtin_cpu_is("amdfam19h") ? "Zen 4" : is_golden_cove() ? "Golden Cove" : "Zen 5";
}
#endif

const char* nearest_row() {
#if defined(__aarch64__)
  return "NEON";
#else
#if defined(__x86_64__)
  // PyTorch's own variable, so that one setting lowers both libraries alike.
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  const bool only_generic = cap && std::strcmp(cap, "default") == 0;
  const bool no_avx512 = only_generic || (cap && std::strcmp(cap, "avx2") == 0);
  if (!no_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512_row();
  }
  // AVX2 never comes without F16C, which clang 14 cannot be asked about.
  if (!only_generic && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return "Zen 3";
  }
#endif
  return "generic";
#endif
}

Tuning detect() {
  Tuning row = *find_tuning(nearest_row());
#if defined(__x86_64__)
  if (row.level3_bytes > 0) {
    row.level3_bytes = level3_bytes();
  }
  // A processor need not have the units of the row that is nearest.
  if (std::string_view(row.simd) == "avx512") {
    const bool has_dot = __builtin_cpu_supports("avx512bf16");
    row.bf16 = !has_dot ? Bf16Units::kNone : may_use_amx() ? Bf16Units::kAmx : Bf16Units::kDot;
    if (row.bf16 == Bf16Units::kAmx && std::string_view(row.name) == "Golden Cove") {
      row.name = find_tuning("Golden Cove with AMX")->name;
    }
  }
#endif
  return row;
}

const Kernels& kernels_of([[maybe_unused]] std::string_view simd) {
#if defined(__x86_64__)
  if (simd == "avx512") {
    return avx512_kernels();
  }
  if (simd == "avx2") {
    return avx2_kernels();
  }
#endif
#if defined(__aarch64__)
  return neon_kernels();
#else
  return generic_kernels();
#endif
}

}  // namespace

const Tuning& machine() {
  static const Tuning row = detect();
  return row;
}

const Kernels& kernels() {
  static const Kernels& chosen = [&]() -> const Kernels& {
    const Kernels& found = kernels_of(machine().simd);
    TORCH_INTERNAL_ASSERT(found.f32_product.mr == machine().mr);
    return found;
  }();
  return chosen;
}

}  // namespace mylayers::cpu
