// AMX's tiles in software, as "Intel 64 and IA-32 Architectures Software Developer's Manual" has
// them (volume 2: LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBF16PS): the kernels
// of csrc/cpu/kernels/amx-inl.h run on it where the processor has none.
//
// What the processor answers with an exception throws a Fault, which says why. What the manual
// leaves open, which NaN a sum becomes, is as on a processor (tests/test_tiles.py compares).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace tile_model {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(bool holds, const std::string& otherwise) {
  if (!holds) {
    throw Fault(otherwise);
  }
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Zero of x's sign for a subnormal x.
inline float without_subnormal(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

// a * b + c in one rounding, to nearest even; subnormal numbers are zero, as operands and as a
// result. Whether a result is subnormal is decided after a rounding to 24 bits, so that what rounds
// up to 2^-126 stays. Of several NaN the first is the result, made quiet.
inline float multiply_add(float a, float b, float c) {
  for (const float x : {a, b, c}) {
    if (std::isnan(x)) {
      return float_of(bits_of(x) | 0x00400000);
    }
  }
  a = without_subnormal(a);
  b = without_subnormal(b);
  c = without_subnormal(c);
  const float sum = std::fma(a, b, c);
  if (std::isnan(sum)) {
    return float_of(0xffc00000);  // as every invalid operation of this processor
  }
  if (std::fabs(sum) == 0x1p-126f) {
    // Rounded up from a number of 23 bits, perhaps. 2^64 times as large it has 24; neither c nor
    // the smaller factor is too large for that here.
    float& smaller = std::fabs(a) < std::fabs(b) ? a : b;
    smaller *= 0x1p64f;
    if (std::fabs(std::fma(a, b, c * 0x1p64f)) < 0x1p-62f) {
      return std::copysign(0.0f, sum);
    }
  }
  return without_subnormal(sum);
}

class Tiles {
 public:
  void configure(const void* memory) {
    uint8_t bytes[64];
    std::memcpy(bytes, memory, sizeof(bytes));
    const int palette = bytes[0];
    require(palette <= 1, "ldtilecfg: there is no palette " + std::to_string(palette));
    if (palette == 0) {
      release();
      return;
    }
    Tile fresh[kTiles] = {};
    for (int i = 2; i < 64; ++i) {
      const bool reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
      require(!reserved || bytes[i] == 0, "ldtilecfg: byte " + std::to_string(i) + " must be zero");
    }
    for (int t = 0; t < kTiles; ++t) {
      const std::string name = "ldtilecfg: tile " + std::to_string(t);
      fresh[t].row_bytes = bytes[16 + 2 * t] + 256 * bytes[17 + 2 * t];
      fresh[t].rows = bytes[48 + t];
      require(fresh[t].row_bytes <= kRowBytes, name + " has rows of more than 64 bytes");
      require(fresh[t].rows <= kRows, name + " has more than 16 rows");
      require(
          (fresh[t].row_bytes == 0) == (fresh[t].rows == 0), name + " has no rows or no columns");
    }
    std::memcpy(tiles_, fresh, sizeof(tiles_));
    configured_ = true;
    start_row_ = bytes[1];
  }

  void release() { *this = Tiles(); }

  void zero(int t) {
    std::memset(use("tilezero", t).data, 0, sizeof(Tile::data));
    start_row_ = 0;
  }

  void load(int t, const void* p, int64_t stride) {
    Tile& tile = use_rows("tileloadd", t);
    for (int i = start_row_; i < tile.rows; ++i) {
      std::memcpy(tile.data[i], static_cast<const char*>(p) + i * stride, tile.row_bytes);
    }
    start_row_ = 0;
  }

  void store(int t, void* p, int64_t stride) {
    const Tile& tile = use_rows("tilestored", t);
    for (int i = start_row_; i < tile.rows; ++i) {
      std::memcpy(static_cast<char*>(p) + i * stride, tile.data[i], tile.row_bytes);
    }
    start_row_ = 0;
  }

  // All 1024 bytes of a tile, whatever its shape.
  void peek(int t, void* out) const { std::memcpy(out, tiles_[t].data, sizeof(Tile::data)); }

  void multiply(int sum, int a, int b) {
    require(sum != a && a != b && b != sum, "tdpbf16ps: three tiles are needed");
    Tile& c = use("tdpbf16ps", sum);
    const Tile &x = use("tdpbf16ps", a), &y = use("tdpbf16ps", b);
    require(
        c.row_bytes % 4 == 0 && x.row_bytes % 4 == 0 && y.row_bytes % 4 == 0,
        "tdpbf16ps: rows must be whole numbers or pairs");
    require(c.rows == x.rows, "tdpbf16ps: the sums must have the rows of a");
    require(c.row_bytes == y.row_bytes, "tdpbf16ps: the sums must have the columns of b");
    require(x.row_bytes / 4 == y.rows, "tdpbf16ps: a must have a pair for each row of b");
    for (int m = 0; m < c.rows; ++m) {
      float sums[kRowBytes / 4];
      std::memcpy(sums, c.data[m], sizeof(sums));
      for (int n = 0; n < c.row_bytes / 4; ++n) {
        float even = 0, odd = 0;
        for (int k = 0; k < y.rows; ++k) {
          even = multiply_add(x.value(m, 2 * k), y.value(k, 2 * n), even);
          odd = multiply_add(x.value(m, 2 * k + 1), y.value(k, 2 * n + 1), odd);
        }
        sums[n] = multiply_add(sums[n], 1, multiply_add(even, 1, odd));
      }
      std::memcpy(c.data[m], sums, c.row_bytes);
    }
    start_row_ = 0;
  }

 private:
  static constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

  struct Tile {
    int rows, row_bytes;
    // Zero beyond the shape, where nothing is ever written. The manual clears that again and again.
    uint8_t data[kRows][kRowBytes];

    float value(int row, int i) const {  // of bfloat16
      uint16_t half;
      std::memcpy(&half, data[row] + 2 * i, sizeof(half));
      return float_of(uint32_t{half} << 16);
    }
  };

  Tile& use(const char* instruction, int t) {
    require(configured_, std::string(instruction) + ": no tiles are configured");
    require(
        tiles_[t].rows > 0,
        std::string(instruction) + ": tile " + std::to_string(t) + " is not configured");
    return tiles_[t];
  }

  // From start_row_ on: what is left of an access to memory that an exception broke off.
  Tile& use_rows(const char* instruction, int t) {
    Tile& tile = use(instruction, t);
    require(tile.row_bytes % 4 == 0, std::string(instruction) + ": rows must be whole numbers");
    require(start_row_ < tile.rows, std::string(instruction) + ": no row is left");
    return tile;
  }

  bool configured_ = false;
  int start_row_ = 0;
  Tile tiles_[kTiles] = {};
};

}  // namespace tile_model
