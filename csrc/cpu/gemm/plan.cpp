#include "plan.h"

#include <algorithm>

#include "../ceil_div.h"
#include "../gemm_amx.h"

namespace mylayers::cpu {
namespace {

// Rows that lie a multiple of this apart share their sets of the caches.
constexpr int64_t kCollision = 4096;
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

  Source source(int64_t in_turn) const;
  int64_t row_block() const;
  int64_t column_block(Source source) const;
  // Whether a second thread costs more than it saves.
  bool is_small() const;
  // Whether so few terms make a product of many columns all writing.
  bool is_flat() const;
  TaskPlan task(Source source) const;

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
  bool has_pair_tiles() const {
    return p_.type == ValueType::kBFloat16 && machine_.bf16 == Bf16Units::kDot;
  }
  // Whether so many rows of so many values from one to the next span that much.
  bool spans(int64_t bytes, int64_t rows, int64_t row) const {
    return rows * row * size() >= bytes;
  }

  bool streams_many(Source source) const;
  bool takes_bands() const;
  bool copies_a() const;
  bool copies_b() const;
  TaskPlan pair_task() const;

  const ProductShape& p_;
  const Tuning& machine_;
};

// Where b, of which a task reads a part, is likely to be. Networks of eight layers of 1024 x 1024
// took 1.25 to 2.5 times as long at 1 to 32 rows while the size of one layer decided, of four
// layers 1.1 to 2.2 times; two layers stay in the cache. A weight (out, in) is asked for line by
// line: eight layers of 1000 x 1000 gain 1.04 to 1.57, four, which a cache of 32 MiB holds, took
// 1.04 to 1.14 times as long, and on a Zen 4 networks whose rows collide up to 1.27 times.
Source Rules::source(int64_t in_turn) const {
  const int64_t bytes = machine_.memory_bytes;
  if (p_.b.col == 1) {
    return in_turn >= bytes || spans(bytes, p_.k, p_.b.row) ? machine_.memory : Source::kCache;
  }
  const bool collide = p_.b.col * size() % kCollision == 0;
  const bool far = in_turn >= 2 * bytes || spans(bytes, p_.n, p_.b.col);
  const bool asks = machine_.memory != Source::kMemoryByLevel2 || !collide;
  return far && asks ? machine_.memory : Source::kCache;
}

// From a cache float32 is read as fast by microkernels, whose sums stay in registers; the machine
// says up to how many rows streaming pays.
bool Rules::streams_many(Source source) const {
  const bool misses = spans(machine_.level2_bytes, p_.k, p_.b.row);
  const int64_t most = source != Source::kCache ? machine_.skinny_max_rows_memory
                       : widens()               ? machine_.skinny_max_rows_16bit
                       : misses                 ? machine_.skinny_max_rows_l2_miss
                                                : 0;
  return p_.m > kStreamRows && p_.m <= most && p_.b.col == 1;
}

// In bands: with a large b, of which strips that follow each other in memory come from level-2
// cache faster than pieces of its rows; and where few terms make a product all writing, as
// microkernels otherwise write short pieces of many rows.
bool Rules::takes_bands() const {
  if (has_pair_tiles()) {
    return false;
  }
  const int64_t bytes = machine_.level2_bytes, rows = machine_.bands_min_rows;
  const bool large = spans(bytes, p_.k, p_.b.row) || spans(bytes, p_.n, p_.b.col);
  if (rows > 0 && p_.m >= rows && p_.n > kPanel && p_.k > kStreamDepth && large) {
    return true;
  }
  const int64_t least = widens() ? 1 : kStreamDepth + 1;
  const int64_t most =
      std::max(machine_.bands_max_terms, widens() ? machine_.bands_max_terms_16bit : 0);
  return p_.n >= machine_.task_columns && p_.m >= machine_.bands_flat_min_rows && p_.k >= least &&
         p_.k <= most;
}

// Whether microkernels copy what they share of a: the lines of its rows collide, or its columns are
// far apart.
bool Rules::copies_a() const {
  const bool apart = p_.a.col == 1 ? p_.a.row * size() % kCollision == 0
                                   : spans(machine_.level1_bytes, p_.k, p_.a.col);
  return machine_.copying_min_rows && p_.m > machine_.tile_rows &&
         p_.n >= machine_.copying_min_columns && apart;
}

bool Rules::copies_b() const {
  const bool many = p_.m >= machine_.copying_min_rows;
  return machine_.copying_min_rows && p_.b.col == 1 &&
         spans(many ? machine_.level1_bytes : machine_.level2_bytes, p_.k, p_.b.row);
}

int64_t Rules::row_block() const {
  return has_pair_tiles() ? machine_.pair_task_rows
         : takes_bands()  ? machine_.bands_task_rows
                          : machine_.task_rows;
}

int64_t Rules::column_block(Source source) const {
  const int64_t many = machine_.skinny_many_sums / p_.m, least = machine_.task_columns;
  const bool few_rows = p_.m <= kStreamRows && p_.k > kStreamDepth && p_.b.col == 1;
  return few_rows               ? machine_.skinny_sums / p_.m
         : has_pair_tiles()     ? std::clamp(many, least, machine_.pair_max_columns)
         : streams_many(source) ? std::clamp(many, least, machine_.skinny_max_columns)
                                : least;
}

// Bands of whole rows then, each band one run of memory. Tasks of 512 columns had two threads fault
// in, and zero, the same pages of 2 MiB: a fresh 4096 x 4096 float32 result took 1.3 to 1.4 times
// as long, on one thread as well.
bool Rules::is_flat() const {
  const int64_t few = std::max(machine_.bands_max_terms, machine_.bands_max_terms_16bit);
  return (!widens() && p_.k <= kStreamDepth) || (p_.k <= few && takes_bands());
}

// Passes of equal depth, as near to `deepest` as they can be: a short last one would load and store
// every sum for little.
int64_t pass_depth(int64_t k, int64_t deepest) {
  return ceil_div(k, std::max<int64_t>(1, (k + deepest / 2) / deepest));
}

TaskPlan Rules::pair_task() const {
  const bool odd = p_.k % 2 != 0;
  if (p_.m <= machine_.pair_skinny_max_rows && p_.b.col == 1 && p_.n > kPanel) {
    return {
        .path = Path::kPairSkinny,
        .depth = p_.k,
        .copies_a = p_.m > kStreamRows || p_.a.col != 1 || odd};
  }
  const int64_t columns = round_up(p_.n, kPanel);
  const int64_t most = std::max(machine_.pair_min_depth, machine_.packed_pairs / columns / 2 * 2);
  return {
      .path = Path::kPairTiles,
      .depth = std::min(round_up(p_.k, 2), most),
      .copies_a = p_.a.col != 1 || odd,
      .packs_b = true};
}

TaskPlan Rules::task(Source source) const {
  const auto [m, n, k, a, b, type, rounds] = p_;
  if (is_amx()) {
    return {
        .path = m <= kAmxPassRows ? Path::kAmxColumns : Path::kAmxRows,
        .depth = k,
        .copies_a = a.col != 1 || rounds,
        .packs_b = true};
  }
  if (k > 0 && has_pair_tiles()) {
    return pair_task();
  }
  if (!widens() && m <= kStreamRows && b.row == 1 && b.col != 1) {
    return {.path = Path::kSkinnyTransposed, .depth = k, .copies_a = a.col != 1};
  }
  // Columns from which streaming outruns microkernels: a sum of few rows stays in registers there,
  // one of few terms is all writing.
  const int64_t least = m <= kStreamRows                     ? kPanel + 1
                        : !widens() && 2 * k <= kStreamDepth ? kPanel / 2
                        : !widens() && k <= kStreamDepth     ? kPanel
                                                             : INT64_MAX;
  if (n >= least && b.col == 1 && k > 0) {
    return {
        .path = Path::kSkinny,
        .depth = pass_depth(k, m <= machine_.shallow_rows ? 2 * machine_.depth : machine_.depth),
        .copies_a = widens()};
  }
  if (n > kPanel && k > 0 && streams_many(source)) {
    return {.path = Path::kSkinnyMany, .depth = pass_depth(k, machine_.depth), .copies_a = true};
  }
  if (takes_bands()) {
    return {
        .path = Path::kBands,
        .depth = pass_depth(k, machine_.depth),
        .copies_a = widens() || a.col != 1,
        .packs_b = true};
  }
  const bool keeps_b = !widens() && copies_b();
  const bool deep = keeps_b || m <= machine_.shallow_rows;
  return {
      .path = Path::kTiles,
      .depth = pass_depth(k, deep ? 2 * machine_.depth : machine_.depth),
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
  constexpr const char* kNames[] = {
      "tiles",      "bands",       "skinny",      "skinny_many", "skinny_transposed",
      "pair_tiles", "pair_skinny", "amx_columns", "amx_rows"};
  return kNames[static_cast<int>(path)];
}

bool may_round(int64_t n, int64_t k, const Tuning& machine) {
  return n >= kPanel && k >= kPanel && n * k >= kRoundedWeight && machine.bf16 == Bf16Units::kAmx;
}

Plan plan(const ProductShape& p, int64_t in_turn, int64_t threads, const Tuning& machine) {
  const Rules rules(p, machine);
  Plan plan = {.source = Source::kCache, .threads = rules.is_small() ? 1 : threads};
  if (rules.is_amx()) {
    plan.rows = p.m;
    plan.cols = p.n;
    plan.row_blocks = plan.col_blocks = 1;
    plan.tasks[1][1] = rules.task(plan.source);
    return plan;
  }
  threads = plan.threads;
  plan.source = rules.source(in_turn);
  // As many tasks as keep every thread busy to the end. Columns are split before rows, because
  // tasks that share columns of b each pack them. Bits do not depend on this choice.
  const int64_t tile = machine.tile_rows;
  int64_t row_blocks = ceil_div(p.m, rules.row_block());
  int64_t col_blocks = ceil_div(p.n, rules.column_block(plan.source));
  if (row_blocks * col_blocks % threads != 0) {
    if (p.n >= threads * 2 * kPanel || p.m < threads * 4 * tile) {
      col_blocks = round_up(col_blocks, threads);
    } else {
      row_blocks = round_up(row_blocks, threads);
    }
  }
  if (p.m >= threads * tile && rules.is_flat()) {
    col_blocks = 1;
    row_blocks = round_up(ceil_div(p.m, machine.task_rows), threads);
  }
  // Whole microkernels; equal tasks come first, so that columns are cut in whole vectors: of 257 in
  // whole panels one thread had 192.
  const int64_t multiple = p.m / row_blocks >= tile ? tile : 1;
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
      plan.tasks[last_rows][last_cols] = Rules(task, machine).task(plan.source);
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
  // As from memory for few rows alone: more would stream their pieces, and 131072 x 16 x 300 took
  // 1.06 times as long.
  piece.k = p.m <= kStreamRows ? p.k : plan.piece;
  plan.source = Rules(piece, machine).source(/*in_turn=*/0);
  for (const bool last : {false, true}) {
    piece.k = last ? p.k - (plan.pieces - 1) * plan.piece : plan.piece;
    plan.tasks[last] = Rules(piece, machine).task(plan.source);
  }
  return plan;
}

}  // namespace mylayers::cpu
