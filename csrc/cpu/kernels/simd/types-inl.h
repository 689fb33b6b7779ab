// Vectors of kBytes, and what every file of simd/ defines for its instruction set.
//
// A set states what it has: kBytes and kRegisters, its vectors' size and number; kSums, how many of
// them hold a microkernel's sums; kFuses, whether multiply_add rounds once; kCopies, whether
// microkernels that copy what they read are compiled, as some row of machine/tuning.cpp wants; and
// by a macro what only some have:
// - MYLAYERS_HAS_STREAMING_STORES: store_non_temporal and fence_non_temporal_stores;
// - MYLAYERS_HAS_PACK_WHOLE_VNNI_ROW: a pack_whole_vnni_row better than that of pack_vnni-inl.h;
// - MYLAYERS_HAS_AVX512_BF16: the target under which bf16_avx512-inl.h and amx-inl.h compile.

template <class C>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(kBytes)));
  typedef int32_t mask __attribute__((vector_size(kBytes)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kBytes)));
  typedef int64_t mask __attribute__((vector_size(kBytes)));
};
template <class C>
using vec = typename Vector<C>::type;
template <class C>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(C));

// x in every lane; x + 0 would lose the sign of -0.
template <class C>
INLINE vec<C> splat(C x) {
  return x - vec<C>{};
}

// memcpy: any alignment is fine, and any compiler makes it one instruction.
template <class V, class T>
INLINE V load_bits(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

INLINE vec<float> load(const float* p) { return load_bits<vec<float>>(p); }
INLINE vec<double> load(const double* p) { return load_bits<vec<double>>(p); }
INLINE void store(float* p, vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
INLINE void store(double* p, vec<double> v) { std::memcpy(p, &v, sizeof(v)); }

typedef uint16_t u16 __attribute__((vector_size(kBytes / 2)));
typedef uint32_t u32 __attribute__((vector_size(kBytes)));
typedef float half_width __attribute__((vector_size(kBytes / 2)));
using Doubles = vec<double>;

// What a set defines. Functions that it cannot better are those of vector-inl.h.

// a * b + c in one rounding where the processor has it. Nothing is left to the compiler
// (-ffp-contract=off): g++ 12 contracts what it sees in one piece, and where one of several copies
// of a loop was not, 3 rows of a batch differed from 1.
template <class C>
INLINE vec<C> multiply_add(vec<C> a, vec<C> b, vec<C> c);

// a + b, and a where both are NaN. An instruction passes on the first of two NaNs, and which
// operand of a + b is first g++ chooses in each copy of a loop: 1 row kept the bits of a bias and 4
// rows those of the sum.
template <class C>
INLINE vec<C> add_in_order(vec<C> a, vec<C> b);

// v, which the compiler must take from a register from here on. g++ 12 made what several
// multiply-adds share an operand in memory of each: a microkernel of 4 x 64 then waited for 20
// loads where it needs 8.
template <class V>
INLINE V in_register(V v);

INLINE u32 widen(u16 v);
INLINE u16 narrow(u32 v);  // the lower half of each
INLINE vec<double> widen(half_width v);

INLINE vec<float> load(const half_t* p);
INLINE void store(half_t* p, vec<float> v);

// Half a vector from p, then half a vector from q, any of whose bits are kept.
template <class C>
INLINE vec<C> load_halves(const void* p, const void* q);

// A set may specialise these.

// The first n of a vector's lanes, n < kLanes; the others are zero, and nothing beyond
// the n values is touched.
template <class T>
INLINE vec<acc_t<T>> load_part(const T* p, int n);
template <class T>
INLINE void store_part(T* p, vec<acc_t<T>> v, int n);

// Defined in vector-inl.h, of widen and narrow.

INLINE vec<float> load(const bfloat16_t* p);
INLINE void store(bfloat16_t* p, vec<float> v);
// Round to nearest even; NaN becomes the quiet NaN that PyTorch writes.
INLINE u16 bfloat16_bits(vec<float> v);
