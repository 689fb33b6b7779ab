// Sizes of the microkernels of an instruction set, and the numbers that go with them.

constexpr int kBytes = MYLAYERS_LEVEL == 2 ? 64 : MYLAYERS_LEVEL == 1 ? 32 : 16;
// Vectors across a whole register tile, and rows of one of so many vectors: 24 of AVX-512's 32
// registers hold sums, 12 of the 16 of others, leaving room for one row of b and the broadcast
// element of a. With AVX2 a step of 4 rows and 3 vectors takes 7 loads where 6 and 2 take 8: on
// Zen 3 1024 x 1024 x 1024 took 0.93 to 0.98 of the time, 64 x 1024 x 1024 0.76 to 1.01.
// Without multiply-adds a 16th register holds the product. Of one vector twice as many rows: six
// sums would wait for their last multiply-adds.
constexpr int kTileVectors = MYLAYERS_LEVEL == 2 ? 4 : MYLAYERS_LEVEL == 1 ? 3 : 2;
constexpr int tile_rows(int vectors) {
  return vectors == 1 ? 12 : vectors == 3 ? (MYLAYERS_LEVEL == 2 ? 8 : 4) : 6;
}
constexpr int kTileRows = tile_rows(kTileVectors);
constexpr int kLeastCopied = 2;  // vectors of a strip of b that tiles copy
// stream_many holds kManySteps rows of kManyVectors vectors of b in registers, and beside them the
// sums of kManyTogether rows of a. With 16 registers, eight rows of one vector took 1.2 to 1.35
// times as long at 16 to 64 rows of 4096 x 4096: each of their multiply-adds needs a broadcast.
constexpr int kManyVectors = 2;
constexpr int kManySteps = MYLAYERS_LEVEL == 2 ? kStreamDepth : 6;
constexpr int kManyTogether = MYLAYERS_LEVEL == 2 ? 2 : 1;
// Steps of a tile's loop in one turn: where another thread shared the core, one at a time took 1.1
// to 1.16 times as long, as 12 multiply-adds came with 13 other instructions; elsewhere no longer.
constexpr int kUnroll = MYLAYERS_LEVEL == 2 ? 1 : 4;
// Measured on Zen 5 (AVX-512), and on Zen 3 at the two other levels. Level 2 of Zen 3, of 512 KiB
// in 8 ways, holds 128 rows that lie 4 KiB apart: without copies 1024 x 1024 x 1024 took 1.5 times
// as long in float32, its weight gradient 1.7 times, 256 x 256 x 256 1.15 times; and 8 and 16 rows
// of 4096 x 4096, on one thread, 1.06 to 1.1 times in runs of 2048 columns. On the Zen 5 float16 of
// 65 to 128 rows streams at 0.99 to 1.08 of the speed of tiles on a core of its own, at 0.83 to
// 0.94 on one that others slow down.
constexpr Tuning kTuning = MYLAYERS_LEVEL == 2
                               ? Tuning{128, 64, 0, 2048, 0, 0, 0, Source::kMemory, 0}
                               : Tuning{48, 32, 16, 4096, 32, 0, 0, Source::kMemory, 0};
constexpr const char* kTunedFor = MYLAYERS_LEVEL == 2 ? "Zen 5" : "Zen 3";
constexpr bool kCopies = kTuning.copying > 0;
