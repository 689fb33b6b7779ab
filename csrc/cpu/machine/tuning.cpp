#include "tuning.h"

namespace mylayers::cpu {
namespace {

// Level 2 of 512 KiB in 8 ways holds 128 rows that lie 4 KiB apart, so that microkernels copy what
// they share. [lab: avx2]
constexpr Tuning kZen3 = {
    .name = "Zen 3",
    .simd = "avx2",
    .mr = 4,
    .bf16 = Bf16Units::kNone,
    .skinny_max_rows_memory = 48,
    .skinny_max_rows_16bit = 32,
    .skinny_max_rows_l2_miss = 16,
    .skinny_max_columns = 4096,
    .copying_min_rows = 32,
    .bands_min_rows = 0,
    .bands_max_terms = 0,
    .memory = Residency::kMemory,
};

// Of 65 to 128 rows, float16 is as fast in a skinny product as in microkernels on a core of its
// own, and slower on one that others slow down. [lab: skinny-gemm]
constexpr Tuning kZen5 = {
    .name = "Zen 5",
    .simd = "avx512",
    .mr = 6,
    .bf16 = Bf16Units::kDot,
    .skinny_max_rows_memory = 128,
    .skinny_max_rows_16bit = 64,
    .skinny_max_rows_l2_miss = 0,
    .skinny_max_columns = 2048,
    .copying_min_rows = 0,
    .bands_min_rows = 0,
    .bands_max_terms = 0,
    .memory = Residency::kMemory,
};

// No processor in particular, and none was measured: x86 without AVX2 and FMA, and others.
constexpr Tuning kGeneric = [] {
  Tuning row = kZen3;
  row.name = "generic";
  row.simd = "generic";
  row.mr = 6;
  row.measured = false;
  return row;
}();

// Any 64-bit Arm: as Zen 5, whose AVX-512 has as many registers.
constexpr Tuning kNeon = [] {
  Tuning row = kZen5;
  row.name = "NEON";
  row.simd = "neon";
  row.mr = 5;
  row.bf16 = Bf16Units::kNone;
  row.measured = false;
  return row;
}();

// As Zen 5, but it gains by prefetching into level 2. [lab: zen-4-prefetch]
constexpr Tuning kZen4 = [] {
  Tuning row = kZen5;
  row.name = "Zen 4";
  row.memory = Residency::kMemoryByLevel2;
  row.level3_bytes = int64_t{32} << 20;
  return row;
}();

// [lab: golden-cove]
constexpr Tuning kGoldenCove = [] {
  Tuning row = kZen5;
  row.name = "Golden Cove";
  row.skinny_max_rows_l2_miss = 48;
  row.bands_min_rows = 32;
  row.bands_max_terms = 64;
  return row;
}();

constexpr Tuning kGoldenCoveAmx = [] {
  Tuning row = kGoldenCove;
  row.name = "Golden Cove with AMX";
  row.bf16 = Bf16Units::kAmx;
  return row;
}();

constexpr Tuning kTunings[] = {kGeneric, kNeon, kZen3, kZen4, kZen5, kGoldenCove, kGoldenCoveAmx};

}  // namespace

std::span<const Tuning> tunings() { return kTunings; }

const Tuning* find_tuning(std::string_view name) {
  for (const Tuning& row : kTunings) {
    if (row.name == name) {
      return &row;
    }
  }
  return nullptr;
}

}  // namespace mylayers::cpu
