#include "plan.h"

#include <algorithm>

#include "../ceil_div.h"
#include "../gemm_amx.h"

namespace mylayers::cpu {
namespace {

// 4 KiB aliasing: rows that lie a multiple of this apart share their sets of the caches.
constexpr int64_t kAliasing = 4096;
// Lanes of the widest vector: columns are cut at multiples.
constexpr int64_t kWidestLane = 16;
// Bits depend on where long sums are cut: into pieces of at least this many terms, and no more of
// them, at multiples; and not where a result is so large that it keeps the threads busy uncut.
constexpr int64_t kLongPiece = 2048;
constexpr int64_t kMostPieces = 64;
constexpr int64_t kPieceMultiple = 256;
constexpr int64_t kLargeResult = 256 * 256;
// Bits depend on which float32 products are rounded too: those of weights of so many values, as
// smaller ones are as fast in float32.
constexpr int64_t kRoundedWeight = 1 << 18;

// The rules, for one product or one task of it.
class Rules {
 public:
  Rules(const ProductShape& p, const Tuning& machine) : p_(p), machine_(machine) {}

  Residency residency(int64_t working_set_bytes) const;
  int64_t row_block() const;
  int64_t column_block(Residency residency) const;
  // Whether a second thread costs more than it saves.
  bool is_small() const;
  // Whether so few terms make a product of many columns all writing.
  bool is_flat() const;
  TaskPlan task(Residency residency) const;

  bool is_amx() const {
    const bool bf16 = p_.type == ValueType::kBFloat16 || p_.rounds;
    return bf16 && machine_.bf16 == Bf16Units::kAmx && p_.k > 0;
  }

 private:
  int64_t size() const {
    return p_.type == ValueType::kFloat64 ? 8 : p_.type == ValueType::kFloat32 ? 4 : 2;
  }
  // Values of 16 bits are widened while they are packed, and summed in scratch memory.
  bool widens() const { return size() == 2; }
  bool uses_vnni_layout() const {
    return p_.type == ValueType::kBFloat16 && machine_.bf16 == Bf16Units::kDot;
  }
  // Whether so many rows of so many values from one to the next span that much.
  bool spans(int64_t bytes, int64_t rows, int64_t row) const {
    return rows * row * size() >= bytes;
  }

  bool is_skinny_many(Residency residency) const;
  bool takes_bands() const;
  bool copies_a() const;
  bool copies_b() const;
  TaskPlan vnni_task() const;

  const ProductShape& p_;
  const Tuning& machine_;
};

// Where b, of which a task reads a part, is likely to be. The weights of a network are read in
// turn, so that all of them together decide. A weight (out, in) is prefetched line by line, which
// costs more where a cache holds it: its bound is twice as high, and rows that alias are not
// prefetched on a Zen 4. [lab: constants]
Residency Rules::residency(int64_t working_set_bytes) const {
  const int64_t bytes = machine_.memory_bytes;
  if (p_.b.col == 1) {
    return working_set_bytes >= bytes || spans(bytes, p_.k, p_.b.row) ? machine_.memory
                                                                      : Residency::kCache;
  }
  const bool aliases = p_.b.col * size() % kAliasing == 0;
  const bool far = working_set_bytes >= 2 * bytes || spans(bytes, p_.n, p_.b.col);
  const bool prefetches = machine_.memory != Residency::kMemoryByLevel2 || !aliases;
  return far && prefetches ? machine_.memory : Residency::kCache;
}

// From a cache float32 is read as fast by microkernels, whose sums stay in registers; the machine
// says up to how many rows a skinny product pays.
bool Rules::is_skinny_many(Residency residency) const {
  const bool misses = spans(machine_.level2_bytes, p_.k, p_.b.row);
  const int64_t most = residency != Residency::kCache ? machine_.skinny_max_rows_memory
                       : widens()                     ? machine_.skinny_max_rows_16bit
                       : misses                       ? machine_.skinny_max_rows_l2_miss
                                                      : 0;
  return p_.m > kSkinnyRows && p_.m <= most && p_.b.col == 1;
}

// In bands: with a large b, of which micropanels that follow each other in memory come from level-2
// cache faster than pieces of its rows; and where few terms make a product all writing, as
// microkernels otherwise write short pieces of many rows.
bool Rules::takes_bands() const {
  if (uses_vnni_layout()) {
    return false;
  }
  const int64_t bytes = machine_.level2_bytes, rows = machine_.bands_min_rows;
  const bool large = spans(bytes, p_.k, p_.b.row) || spans(bytes, p_.n, p_.b.col);
  if (rows > 0 && p_.m >= rows && p_.n > kPanel && p_.k > kSkinnyTerms && large) {
    return true;
  }
  const int64_t least = widens() ? 1 : kSkinnyTerms + 1;
  const int64_t most =
      std::max(machine_.bands_max_terms, widens() ? machine_.bands_max_terms_16bit : 0);
  return p_.n >= machine_.task_columns && p_.m >= machine_.bands_flat_min_rows && p_.k >= least &&
         p_.k <= most;
}

// Whether microkernels copy what they share of a: the lines of its rows alias, or its columns are
// far apart.
bool Rules::copies_a() const {
  const bool misses = p_.a.col == 1 ? p_.a.row * size() % kAliasing == 0
                                    : spans(machine_.level1_bytes, p_.k, p_.a.col);
  return machine_.copying_min_rows && p_.m > machine_.mr && p_.n >= machine_.copying_min_columns &&
         misses;
}

bool Rules::copies_b() const {
  const bool many = p_.m >= machine_.copying_min_rows;
  return machine_.copying_min_rows && p_.b.col == 1 &&
         spans(many ? machine_.level1_bytes : machine_.level2_bytes, p_.k, p_.b.row);
}

int64_t Rules::row_block() const {
  return uses_vnni_layout() ? machine_.vnni_task_rows
         : takes_bands()    ? machine_.bands_task_rows
                            : machine_.task_rows;
}

int64_t Rules::column_block(Residency residency) const {
  const int64_t many = machine_.skinny_many_sums / p_.m, least = machine_.task_columns;
  const bool few_rows = p_.m <= kSkinnyRows && p_.k > kSkinnyTerms && p_.b.col == 1;
  return few_rows                    ? machine_.skinny_sums / p_.m
         : uses_vnni_layout()        ? std::clamp(many, least, machine_.vnni_max_columns)
         : is_skinny_many(residency) ? std::clamp(many, least, machine_.skinny_max_columns)
                                     : least;
}

// Bands of whole rows then, each band one run of memory. Tasks of 512 columns had two threads fault
// in, and zero, the same pages of 2 MiB. [lab: constants]
bool Rules::is_flat() const {
  const int64_t few = std::max(machine_.bands_max_terms, machine_.bands_max_terms_16bit);
  return (!widens() && p_.k <= kSkinnyTerms) || (p_.k <= few && takes_bands());
}

// Passes of equal KC, as near to `deepest` as they can be: a short last one would load and store
// every sum for little.
int64_t pass_kc(int64_t k, int64_t deepest) {
  return ceil_div(k, std::max<int64_t>(1, (k + deepest / 2) / deepest));
}

TaskPlan Rules::vnni_task() const {
  const bool odd = p_.k % 2 != 0;
  if (p_.m <= machine_.vnni_skinny_max_rows && p_.b.col == 1 && p_.n > kPanel) {
    return {
        .path = Path::kVnniSkinny,
        .kc = p_.k,
        .copies_a = p_.m > kSkinnyRows || p_.a.col != 1 || odd};
  }
  const int64_t columns = round_up(p_.n, kPanel);
  const int64_t most = std::max(machine_.vnni_min_kc, machine_.vnni_values / columns / 2 * 2);
  return {
      .path = Path::kVnni,
      .kc = std::min(round_up(p_.k, 2), most),
      .copies_a = p_.a.col != 1 || odd,
      .packs_b = true};
}

TaskPlan Rules::task(Residency residency) const {
  const auto [m, n, k, a, b, type, rounds] = p_;
  if (is_amx()) {
    return {
        .path = m <= kAmxPassRows ? Path::kAmxColumns : Path::kAmxRows,
        .kc = k,
        .copies_a = a.col != 1 || rounds,
        .packs_b = true};
  }
  if (k > 0 && uses_vnni_layout()) {
    return vnni_task();
  }
  if (!widens() && m <= kSkinnyRows && b.row == 1 && b.col != 1) {
    return {.path = Path::kSkinnyTransposed, .kc = k, .copies_a = a.col != 1};
  }
  // Columns from which a skinny product outruns microkernels: a sum of few rows stays in registers
  // there, one of few terms is all writing.
  const int64_t least = m <= kSkinnyRows                     ? kPanel + 1
                        : !widens() && 2 * k <= kSkinnyTerms ? kPanel / 2
                        : !widens() && k <= kSkinnyTerms     ? kPanel
                                                             : INT64_MAX;
  if (n >= least && b.col == 1 && k > 0) {
    return {
        .path = Path::kSkinny,
        .kc = pass_kc(k, m <= machine_.shallow_rows ? 2 * machine_.kc : machine_.kc),
        .copies_a = widens()};
  }
  if (n > kPanel && k > 0 && is_skinny_many(residency)) {
    return {.path = Path::kSkinnyMany, .kc = pass_kc(k, machine_.kc), .copies_a = true};
  }
  if (takes_bands()) {
    return {
        .path = Path::kBands,
        .kc = pass_kc(k, machine_.kc),
        .copies_a = widens() || a.col != 1,
        .packs_b = true};
  }
  const bool keeps_b = !widens() && copies_b();
  const bool deep = keeps_b || m <= machine_.shallow_rows;
  return {
      .path = Path::kMicrokernels,
      .kc = pass_kc(k, deep ? 2 * machine_.kc : machine_.kc),
      .copies_a = widens(),
      .packs_b = widens() || b.col != 1,
      .keeps_a = !widens() && copies_a(),
      .keeps_b = keeps_b};
}

bool Rules::is_small() const {
  const double weight = static_cast<double>(p_.n) * static_cast<double>(p_.k);
  if (is_amx()) {
    // A tile of one row takes as long as one of sixteen, and so does packing for it.
    return static_cast<double>(std::max(p_.m, kAmxTileRows)) * weight <= machine_.serial_work_amx;
  }
  return static_cast<double>(p_.m) * weight <= machine_.serial_work;
}

}  // namespace

const char* path_name(Path path) {
  constexpr const char* kNames[] = {"microkernels",      "bands", "skinny",      "skinny_many",
                                    "skinny_transposed", "vnni",  "vnni_skinny", "amx_columns",
                                    "amx_rows"};
  return kNames[static_cast<int>(path)];
}

bool may_round(int64_t n, int64_t k, const Tuning& machine) {
  return n >= kPanel && k >= kPanel && n * k >= kRoundedWeight && machine.bf16 == Bf16Units::kAmx;
}

Plan plan(
    const ProductShape& p, int64_t working_set_bytes, int64_t threads, const Tuning& machine) {
  const Rules rules(p, machine);
  Plan plan = {.residency = Residency::kCache, .threads = rules.is_small() ? 1 : threads};
  if (rules.is_amx()) {
    plan.rows = p.m;
    plan.cols = p.n;
    plan.row_blocks = plan.col_blocks = 1;
    plan.tasks[1][1] = rules.task(plan.residency);
    return plan;
  }
  threads = plan.threads;
  plan.residency = rules.residency(working_set_bytes);
  // As many tasks as keep every thread busy to the end. Columns are split before rows, because
  // tasks that share columns of b each pack them. Bits do not depend on this choice.
  const int64_t mr = machine.mr;
  int64_t row_blocks = ceil_div(p.m, rules.row_block());
  int64_t col_blocks = ceil_div(p.n, rules.column_block(plan.residency));
  if (row_blocks * col_blocks % threads != 0) {
    if (p.n >= threads * 2 * kPanel || p.m < threads * 4 * mr) {
      col_blocks = round_up(col_blocks, threads);
    } else {
      row_blocks = round_up(row_blocks, threads);
    }
  }
  if (p.m >= threads * mr && rules.is_flat()) {
    col_blocks = 1;
    row_blocks = round_up(ceil_div(p.m, machine.task_rows), threads);
  }
  // Whole microkernels; equal tasks come first, so that columns are cut in whole vectors: of 257 in
  // whole panels one thread had 192.
  const int64_t multiple = p.m / row_blocks >= mr ? mr : 1;
  plan.rows = round_up(ceil_div(p.m, row_blocks), multiple);
  plan.cols = round_up(ceil_div(p.n, col_blocks), kWidestLane);
  plan.row_blocks = ceil_div(p.m, plan.rows);
  plan.col_blocks = ceil_div(p.n, plan.cols);
  for (const bool last_rows : {false, true}) {
    for (const bool last_cols : {false, true}) {
      if ((!last_rows && plan.row_blocks == 1) || (!last_cols && plan.col_blocks == 1)) {
        continue;  // there are no others
      }
      ProductShape task = p;
      task.m = last_rows ? p.m - (plan.row_blocks - 1) * plan.rows : plan.rows;
      task.n = last_cols ? p.n - (plan.col_blocks - 1) * plan.cols : plan.cols;
      plan.tasks[last_rows][last_cols] = Rules(task, machine).task(plan.residency);
    }
  }
  return plan;
}

LongPlan plan_long(const ProductShape& p, const Tuning& machine) {
  LongPlan plan = {};
  plan.piece = std::max(kLongPiece, round_up(ceil_div(p.k, kMostPieces), kPieceMultiple));
  plan.pieces = p.m * p.n > kLargeResult ? 1 : ceil_div(p.k, plan.piece);
  if (plan.pieces < 2) {
    plan.pieces = 1;
    return plan;
  }
  ProductShape piece = p;
  // As from memory for few rows alone: of more, each piece would become a skinny product.
  // [lab: constants]
  piece.k = p.m <= kSkinnyRows ? p.k : plan.piece;
  plan.residency = Rules(piece, machine).residency(/*working_set_bytes=*/0);
  for (const bool last : {false, true}) {
    piece.k = last ? p.k - (plan.pieces - 1) * plan.piece : plan.piece;
    plan.tasks[last] = Rules(piece, machine).task(plan.residency);
  }
  return plan;
}

}  // namespace mylayers::cpu
