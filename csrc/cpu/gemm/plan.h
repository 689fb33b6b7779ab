// Which way a product goes, how it is cut into tasks, and what each of them packs: a pure function
// of sizes, strides, dtype and machine, asked once for a product. What runs does what it says.
#pragma once

#include <cstdint>
#include <string_view>

#include "../../export.h"
#include "../machine/tuning.h"

namespace mylayers::cpu {

enum class ValueType { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct Strides {
  int64_t row, col;  // in elements
  Strides transposed() const { return {col, row}; }
};

// c (m, n) = act(a (m, k) @ b (k, n) + bias).
struct ProductShape {
  int64_t m, n, k;
  Strides a, b;
  ValueType type;
  bool rounds = false;  // float32 is multiplied as bfloat16, where may_round
};

// kMicrokernels and kBands compute c in microkernels, the one a block of c at a time, the other the
// rows of a microkernel with all columns; the skinny ones read b as it lies in memory, once.
enum class Path {
  kMicrokernels,
  kBands,
  kSkinny,            // few rows of a, or few of b
  kSkinnyMany,        // more rows of a
  kSkinnyTransposed,  // few rows of a, and a b that lies along k
  kVnni,              // bfloat16 by AVX512-BF16, b packed in the VNNI layout
  kVnniSkinny,        // the same of few rows, the layout made while b is read
  kAmxColumns,        // bfloat16 on AMX: each thread packs columns of its own
  kAmxRows,           // all threads pack, then each computes rows of its own
};
MYLAYERS_API const char* path_name(Path path);
inline bool is_amx(Path path) { return path == Path::kAmxColumns || path == Path::kAmxRows; }

// How one thread computes one task.
struct TaskPlan {
  Path path;
  int64_t kc;             // terms of one pass (KC); on AMX those are its own
  bool copies_a = false;  // rows of a are copied, and widened, before they are used
  bool packs_b = false;   // b is packed, and widened
  bool keeps_a = false;   // microkernels copy what they read of a, for the next columns
  bool keeps_b = false;   // and of b, for the next rows
};

struct Plan {
  Residency residency;  // where b is likely to be
  int64_t threads;
  int64_t rows, cols;  // of a task; the last ones may have fewer. On AMX all of them
  int64_t row_blocks, col_blocks;
  TaskPlan tasks[2][2];  // of the others and of the last rows; of the others and the last columns

  const TaskPlan& task(int64_t row_block, int64_t col_block) const {
    return tasks[row_block + 1 == row_blocks][col_block + 1 == col_blocks];
  }
};

// A sum of many terms, cut into pieces whose sums are added in order.
struct LongPlan {
  int64_t piece, pieces;  // terms of one, and how many; one piece: as any product
  Residency residency;
  TaskPlan tasks[2];  // of the others, and of the last
};

// Whether float32 products with a weight (k, n) may be rounded to bfloat16 where PyTorch's setting
// allows it. The rows have no say, as their bits would depend on how many there are.
MYLAYERS_API bool may_round(int64_t n, int64_t k, const Tuning& machine);

// m, n > 0. `working_set_bytes`: bytes of all weights that are read in turn with b, or 0.
// `threads`: how many there are; small products take one.
MYLAYERS_API Plan plan(
    const ProductShape& product, int64_t working_set_bytes, int64_t threads, const Tuning& machine);

MYLAYERS_API LongPlan plan_long(const ProductShape& product, const Tuning& machine);

}  // namespace mylayers::cpu
