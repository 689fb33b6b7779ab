// Sizes of the microkernels of an instruction set, and the numbers that go with them.

// Vectors across the largest microkernel, and rows (MR) of one of so many vectors: kSums registers
// hold sums, leaving room for one row of b and the broadcast element of a. With AVX2 a step of 4
// rows and 3 vectors takes 7 loads where 6 and 2 take 8. Without multiply-adds a 16th register
// holds the product. Of one vector twice as many rows: six sums would wait for their last
// multiply-adds.
constexpr int kNrVectors = kRegisters == 32 ? 4 : kFuses ? 3 : 2;
constexpr int mr_of(int vectors) { return vectors == 1 ? 12 : vectors == 2 ? 6 : kSums / vectors; }
constexpr int kMr = mr_of(kNrVectors);
// Vectors of a microkernel of one row: as many sums as hide how long a multiply-add takes.
// [lab: freeze]
constexpr int kRowVectors = 8;
constexpr int kLeastCopied = 2;  // vectors of a micropanel of b that microkernels copy
// skinny_many holds kManySteps rows of kManyVectors vectors of b in registers, and beside them the
// sums of kManyTogether rows of a. With 16 registers, eight rows of one vector would need a
// broadcast for each multiply-add. [lab: constants]
constexpr int kManyVectors = 2;
constexpr int kManySteps = kRegisters == 32 ? kSkinnyTerms : 6;
constexpr int kManyTogether = kRegisters == 32 ? 2 : 1;
// Terms in one turn of a microkernel's loop. One at a time, 12 multiply-adds come with 13 other
// instructions, and these take time where another thread shares the core. [lab: constants]
constexpr int kUnroll = kRegisters == 32 ? 1 : 4;
