// Loads and stores of every storage type, whole and in part.

INLINE vec<float> load(const bfloat16_t* p) { return (vec<float>)(widen(load_bits<u16>(p)) << 16); }
INLINE u16 bfloat16_bits(vec<float> v) {
  const u32 bits = (u32)v;
  const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrow(v != v ? u32{} + 0x7fc0 : rounded);
}
INLINE void store(bfloat16_t* p, vec<float> v) {
  const u16 out = bfloat16_bits(v);
  std::memcpy(p, &out, sizeof(out));
}

template <class T>
INLINE vec<acc_t<T>> load_part(const T* p, int n) {
  T lanes[kLanes<acc_t<T>>] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
INLINE void store_part(T* p, vec<acc_t<T>> v, int n) {
  T lanes[kLanes<acc_t<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

// n lanes, n <= kLanes; inlined into for_vectors, the choice is made at compile time.
template <class T>
INLINE vec<acc_t<T>> load_n(const T* p, int n) {
  return n == kLanes<acc_t<T>> ? load(p) : load_part(p, n);
}
template <class T>
INLINE void store_n(T* p, vec<acc_t<T>> v, int n) {
  n == kLanes<acc_t<T>> ? store(p, v) : store_part(p, v, n);
}

// Rounded to T and back.
template <class T>
INLINE vec<acc_t<T>> rounded(vec<acc_t<T>> v) {
  T lanes[kLanes<acc_t<T>>];
  store(lanes, v);
  return load(lanes);
}

// n values, `stride` apart; the other lanes are zero.
template <class T>
INLINE vec<acc_t<T>> load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) {
    return load_n(p, n);
  }
  T lanes[kLanes<acc_t<T>>] = {};
  for (int l = 0; l < n; ++l) {
    std::memcpy(lanes + l, p + l * stride, sizeof(T));
  }
  return load(lanes);
}
