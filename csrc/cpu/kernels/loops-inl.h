// Loops over the vectors of a row.

// body(j, n) for every vector of `count` elements: whole ones, kTogether at a time, then the rest,
// if any.
template <class C, int kTogether = 4, class Body>
INLINE void for_vectors(int64_t count, Body body) {
  constexpr int L = kLanes<C>;
  int64_t j = 0;
  if constexpr (kTogether == 4) {
    for (; j + 4 * L <= count; j += 4 * L) {
      body(j, L);
      body(j + L, L);
      body(j + 2 * L, L);
      body(j + 3 * L, L);
    }
  }
  _Pragma("GCC unroll 1") for (; j + L <= count; j += L) { body(j, L); }
  if (j < count) {
    body(j, static_cast<int>(count - j));
  }
}

// The same from the last vector to the first, one at a time: by four the prefetcher lost its
// track. [lab: constants]
template <class C, class Body>
INLINE void for_vectors_down(int64_t count, Body body) {
  constexpr int L = kLanes<C>;
  int64_t j = count / L * L;
  if (j < count) {
    body(j, static_cast<int>(count - j));
  }
  _Pragma("GCC unroll 1") while (j > 0) {
    j -= L;
    body(j, L);
  }
}

#define BODY [&](int64_t j, int n) __attribute__((always_inline))
