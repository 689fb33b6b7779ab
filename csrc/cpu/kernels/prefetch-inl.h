// Software prefetches.

constexpr int64_t kLine = 64;  // bytes that memory and caches move at once

// To the cache of a level. p + ahead may lie beyond the memory at hand.
template <int kLevel = 1, class T>
INLINE void prefetch(const T* p, int64_t ahead) {
  constexpr int kLocality = 4 - kLevel;
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + sizeof(T) * ahead), 0,
      kLocality);
}

// kVectors vectors, which may lie on two lines.
template <int kVectors, int kLevel = 1, class T>
INLINE void prefetch_row(const T* p, int64_t ahead) {
  constexpr int64_t kValues = kVectors * kLanes<acc_t<T>>;
  prefetch<kLevel>(p, ahead);
  if constexpr (kValues * sizeof(T) > kLine) {
    prefetch<kLevel>(p, ahead + kValues - 1);
  }
}

// The kSteps rows of b that follow as many.
template <int kSteps, int kVectors, int kLevel = 2, class T>
INLINE void prefetch_next_rows(const T* b, int64_t ldb) {
  UNROLL
  for (int s = kSteps; s < 2 * kSteps; ++s) {
    prefetch_row<kVectors, kLevel>(b, s * ldb);
  }
}

// Rows of b that a microkernel which copies them prefetches ahead of its step. [lab: constants]
constexpr int64_t kAhead = 16;
// Bytes by which a transposed b is prefetched ahead. [lab: constants]
constexpr int64_t kAheadInRow = 512;

// Prefetches the rows of a that follow those of a microkernel, a line at each step, so that the
// next one need not wait where a comes from memory.
template <int kRows>
class NextRows {
 public:
  INLINE NextRows(const void* a, int64_t row_bytes)
      : at_(reinterpret_cast<uintptr_t>(a) + kRows * row_bytes), row_bytes_(row_bytes) {}
  INLINE void prefetch() {
    __builtin_prefetch(reinterpret_cast<const void*>(at_));
    at_ += row_bytes_;
    if (++row_ == kRows) {
      row_ = 0;
      at_ += kLine - kRows * row_bytes_;
    }
  }

 private:
  uintptr_t at_;
  int64_t row_bytes_;
  int row_ = 0;
};
