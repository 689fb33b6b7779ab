// Sizes of the microkernels of an instruction set, and the numbers that go with them.

// Vectors across a whole register tile, and rows of one of so many vectors: kSums registers hold
// sums, leaving room for one row of b and the broadcast element of a. With AVX2 a step of 4 rows
// and 3 vectors takes 7 loads where 6 and 2 take 8: on Zen 3 1024 x 1024 x 1024 took 0.93 to 0.98
// of the time, 64 x 1024 x 1024 0.76 to 1.01. Without multiply-adds a 16th register holds the
// product. Of one vector twice as many rows: six sums would wait for their last multiply-adds.
constexpr int kTileVectors = kRegisters == 32 ? 4 : kFuses ? 3 : 2;
constexpr int tile_rows(int vectors) {
  return vectors == 1 ? 12 : vectors == 2 ? 6 : kSums / vectors;
}
constexpr int kTileRows = tile_rows(kTileVectors);
constexpr int kLeastCopied = 2;  // vectors of a strip of b that tiles copy
// stream_many holds kManySteps rows of kManyVectors vectors of b in registers, and beside them the
// sums of kManyTogether rows of a. With 16 registers, eight rows of one vector took 1.2 to 1.35
// times as long at 16 to 64 rows of 4096 x 4096: each of their multiply-adds needs a broadcast.
constexpr int kManyVectors = 2;
constexpr int kManySteps = kRegisters == 32 ? kStreamDepth : 6;
constexpr int kManyTogether = kRegisters == 32 ? 2 : 1;
// Steps of a tile's loop in one turn: where another thread shared the core, one at a time took 1.1
// to 1.16 times as long, as 12 multiply-adds came with 13 other instructions; elsewhere no longer.
constexpr int kUnroll = kRegisters == 32 ? 1 : 4;
