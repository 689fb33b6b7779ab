// The kernels of csrc/cpu/kernels/amx-inl.h and the tile instructions one by one, for
// tests/test_tiles.py: with -DMYLAYERS_TILE_MODEL in software, at any level, else on the processor.
#include "tiles.h"

#include <string>
#include <utility>

#if !defined(MYLAYERS_ISA)
#define MYLAYERS_ISA generic
#endif

#if defined(MYLAYERS_TILE_MODEL)
// What amx-inl.h expects to find.
namespace mylayers::cpu::MYLAYERS_ISA {
namespace {

thread_local tile_model::Tiles model;
struct TileShapes;
inline void tile_configure(const TileShapes& shapes) { model.configure(&shapes); }
inline void tile_release() { model.release(); }
template <int kTile>
void tile_zero() {
  model.zero(kTile);
}
template <int kTile>
void tile_load(const void* p, int64_t row_bytes) {
  model.load(kTile, p, row_bytes);
}
template <int kTile>
void tile_load_once(const void* p, int64_t row_bytes) {
  model.load(kTile, p, row_bytes);
}
template <int kTile>
void tile_store(void* p, int64_t row_bytes) {
  model.store(kTile, p, row_bytes);
}
template <int kSum, int kA, int kB>
void tile_multiply() {
  model.multiply(kSum, kA, kB);
}

}  // namespace
}  // namespace mylayers::cpu::MYLAYERS_ISA
constexpr bool kModel = true;
#else
constexpr bool kModel = false;
#endif

#define MYLAYERS_WITHOUT_TABLE
#include "../../csrc/cpu/kernels/kernels-inl.h"

namespace {

using namespace mylayers;
using namespace mylayers::cpu;
using namespace mylayers::cpu::MYLAYERS_ISA;

// f(), and what the model found wrong, or nothing.
template <class F>
const char* checked(F f) {
  static thread_local std::string fault;
  try {
    f();
    return nullptr;
  } catch (const tile_model::Fault& found) {
    fault = found.what();
    return fault.c_str();
  }
}

// f with the number of a tile as a constant.
template <class F>
void with_tile(int t, F f) {
  for_each_of<8>([&]<int kTile>(std::integral_constant<int, kTile> tile) {
    if (t == kTile) {
      f(tile);
    }
  });
}

}  // namespace

extern "C" {

const char* configure(const TileShapes* shapes) {
  return checked([&] { tile_configure(*shapes); });
}
const char* release() {
  return checked([&] { tile_release(); });
}
const char* zero(int t) {
  return checked([&] { with_tile(t, [&](auto tile) { tile_zero<tile.value>(); }); });
}
const char* load_tile(int t, const void* p, int64_t row_bytes) {
  return checked([&] { with_tile(t, [&](auto tile) { tile_load<tile.value>(p, row_bytes); }); });
}
const char* load_tile_once(int t, const void* p, int64_t row_bytes) {
  return checked(
      [&] { with_tile(t, [&](auto tile) { tile_load_once<tile.value>(p, row_bytes); }); });
}
const char* store_tile(int t, void* p, int64_t row_bytes) {
  return checked([&] { with_tile(t, [&](auto tile) { tile_store<tile.value>(p, row_bytes); }); });
}
const char* multiply(int sum, int a, int b) {
  return checked([&] {
    with_tile(sum, [&](auto s) {
      with_tile(a, [&](auto x) {
        with_tile(b, [&](auto y) {
          // No assembler takes others.
          if constexpr (kModel || (s != x && x != y && y != s)) {
            tile_multiply<s.value, x.value, y.value>();
          }
        });
      });
    });
  });
}

#if defined(MYLAYERS_TILE_MODEL)
const char* peek(int t, void* out) {
  return checked([&] { model.peek(t, out); });
}
#endif

const char* macrokernel(
    int64_t m, int64_t cols, int64_t k, const bfloat16_t* a, int64_t lda, const bfloat16_t* last,
    const bfloat16_t* b, int64_t panel_size, float* sums, int64_t ld_sums, bool accumulate,
    const float* bias, ActivationKind act, bfloat16_t* out, int64_t ld_out) {
  return checked([&] {
    kAmx.macrokernel(
        m, cols, k, a, lda, last, b, panel_size, sums, ld_sums, accumulate, bias, act, out, ld_out);
  });
}
const char* macrokernel_f32(
    int64_t m, int64_t cols, int64_t k, const bfloat16_t* a, int64_t lda, const bfloat16_t* last,
    const bfloat16_t* b, int64_t panel_size, float* sums, int64_t ld_sums, bool accumulate,
    const float* bias, ActivationKind act, float* out, int64_t ld_out) {
  return checked([&] {
    kAmx.macrokernel_f32(
        m, cols, k, a, lda, last, b, panel_size, sums, ld_sums, accumulate, bias, act, out, ld_out);
  });
}
const char* copy(
    int64_t rows, int64_t k, const bfloat16_t* in, int64_t in_row, int64_t in_col, bfloat16_t* out,
    int64_t ld_out) {
  return checked([&] { kAmx.copy(rows, k, in, in_row, in_col, out, ld_out); });
}
const char* copy_rounded(
    int64_t rows, int64_t k, const float* in, int64_t in_row, int64_t in_col, bfloat16_t* out,
    int64_t ld_out) {
  return checked([&] { kAmx.copy_rounded(rows, k, in, in_row, in_col, out, ld_out); });
}
const char* pairs_rounded(
    int64_t rows, int64_t cols, const float* in, int64_t in_row, int64_t in_col, bfloat16_t* out,
    int64_t panel_size) {
  return checked([&] { kAmx.pack_rounded(rows, cols, in, in_row, in_col, out, panel_size); });
}
const char* pairs(
    int64_t rows, int64_t cols, const bfloat16_t* in, int64_t in_row, int64_t in_col,
    bfloat16_t* out, int64_t panel_size) {
  return checked([&] { pack_vnni(rows, cols, in, in_row, in_col, out, panel_size); });
}
// x = act(x), by this level's functions.
const char* activate_values(int64_t count, float* x, ActivationKind act) {
  return checked([&] { activate(1, count, x, count, act); });
}

}  // extern "C"
