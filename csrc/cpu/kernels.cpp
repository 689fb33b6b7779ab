#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace mylayers::cpu {
namespace {

const Kernels& choose() {
  // PyTorch's own variable, so that one setting lowers both libraries alike.
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  const bool only_generic = cap && std::strcmp(cap, "default") == 0;
  const bool no_avx512 = only_generic || (cap && std::strcmp(cap, "avx2") == 0);
#if defined(__x86_64__)
  if (!no_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512_kernels();
  }
  // AVX2 never comes without F16C, which clang 14 cannot be asked about.
  if (!only_generic && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2_kernels();
  }
#endif
  return generic_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace mylayers::cpu
