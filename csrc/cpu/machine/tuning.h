// The numbers by which work is cut and one way overtakes another, a row a microarchitecture.
//
// They change how fast a result comes and never its bits: what bits depend on (kLongPiece,
// kRunChunk, kRoundedWeight and their like) stands where it is used, one value for all processors.
// [lab: NAME] is the page docs/lab/YYYY-MM-NAME.md on which a number was found.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "../../export.h"
#include "../kernels/kernels.h"

namespace mylayers::cpu {

// What multiplies bfloat16: float32 instructions, AVX512-BF16's dot products of pairs, or AMX.
enum class Bf16Units { kNone, kDot, kAmx };

struct Tuning {
  const char* name;  // of the microarchitecture
  const char* simd;  // the instruction set of its kernels: kernels/simd/
  int64_t mr;        // of its largest microkernel, the same as in kernels/blocking-inl.h
  Bf16Units bf16;
  // Whether the numbers were found on such a machine. If not, nobody knows whether our kernels are
  // faster than PyTorch's there (gemm_aten.h).
  bool measured = true;

  // Rows of a. Up to so many take a skinny product, which reads b as it lies, more take
  // microkernels: b likely from memory; 16-bit b from a cache; wider b from beyond level 2.
  // [lab: skinny-gemm]
  int64_t skinny_max_rows_memory;
  int64_t skinny_max_rows_16bit;
  int64_t skinny_max_rows_l2_miss;
  // Columns of one task of it, at most. [lab: avx2]
  int64_t skinny_max_columns;
  // Rows of a. Microkernels copy a micropanel of a b from beyond level-1 cache that so many share,
  // or fewer from beyond level 2. 0: they copy nothing, and their kernels need not be able to.
  // [lab: avx2]
  int64_t copying_min_rows;
  // Rows of a. From so many on, a b from beyond level-2 cache is packed and multiplied in bands:
  // the rows of a microkernel with all columns, then the next rows. 0: never. [lab: golden-cove]
  int64_t bands_min_rows;
  // Terms. Up to so many, any wide product of more rows is. [lab: golden-cove]
  int64_t bands_max_terms;
  // kMemory, or kMemoryByLevel2 where a core gains by prefetching into level 2.
  // [lab: zen-4-prefetch]
  Residency memory;
  // Bytes of the level-3 cache of a processor that gains where what does not fit in it is written
  // past it. 0: none. Detected. [lab: center]
  int64_t level3_bytes = 0;

  // From here on no row differs yet.

  // Bytes that a weight spans, or all weights that are read in turn do, from which on it is likely
  // to come from memory. Few rows wait for it, and take a skinny product: microkernels would touch
  // short pieces of its rows. [lab: skinny-gemm]
  int64_t memory_bytes = 16 << 20;
  // Bytes that a weight spans where it leaves level-2 cache, and level 1.
  int64_t level2_bytes = 1 << 20;
  int64_t level1_bytes = 1 << 15;

  // Rows and columns of one task, at most. Its share of the output, of a for one KC and of b
  // where that is packed then stay in level-2 cache, while rows of b are read in runs of 2 KiB.
  int64_t task_rows = 256;
  int64_t task_columns = 512;
  // Rows of one of AVX512-BF16's microkernels: more, as each task packs its share of the weight.
  // Not so in float16, whose sums would fill 1 MiB of scratch memory. [lab: constants]
  int64_t vnni_task_rows = 1024;
  // Rows of one of bands, which packs what it reads of b less often so: whole microkernels, whose
  // share of a stays in level-2 cache beside that of b. [lab: golden-cove]
  int64_t bands_task_rows = 480;
  // Sums of one task of a skinny product, 32 KiB of float32: it reads runs as long as level-1 cache
  // allows. And of one of more rows, 256 KiB. [lab: skinny-gemm]
  int64_t skinny_sums = 8192;
  int64_t skinny_many_sums = 1 << 16;
  // Multiply-adds up to which a second thread costs more than it saves: on AMX they take less time.
  double serial_work = 1 << 19;
  double serial_work_amx = 1 << 20;

  // Terms of one pass over a task (KC), about: 256 x 64 float32, a panel, are 64 KiB. Up to
  // shallow_rows rows of a, and where microkernels copy b, twice as many, to load and store their
  // sums half as often. [lab: constants]
  int64_t kc = 256;
  int64_t shallow_rows = 32;
  // Columns that pay for a copy of a. [lab: constants]
  int64_t copying_min_columns = 128;
  // Terms up to which a product of 16 bits is multiplied in bands on every processor, its sums
  // going through level-1 cache instead of level 2; and the fewest rows that b is packed for then.
  // [lab: golden-cove]
  int64_t bands_max_terms_16bit = 16;
  int64_t bands_flat_min_rows = 33;

  // Rows up to which b in bfloat16 gets the VNNI layout while it is read, and is not packed.
  // [lab: constants]
  int64_t vnni_skinny_max_rows = 16;
  // Values that are packed in the VNNI layout together, few rows taking long runs of b; terms, at
  // least; and columns of one task, at most. Only one panel of them (128 KiB) and the rows of a are
  // read again and again, so that they need not stay in level-2 cache as a whole. [lab: constants]
  int64_t vnni_values = 1 << 19;
  int64_t vnni_min_kc = 64;
  int64_t vnni_max_columns = 1024;
};

// All rows, and the one of a name, or null.
MYLAYERS_API std::span<const Tuning> tunings();
MYLAYERS_API const Tuning* find_tuning(std::string_view name);

// This processor's, found at first use: the nearest row, with the units that the process may use.
MYLAYERS_API const Tuning& machine();

}  // namespace mylayers::cpu
