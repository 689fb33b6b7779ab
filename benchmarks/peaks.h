// How fast the cores of this machine multiply and add, by kind of unit.
//
// A chunk is a loop over independent sums that stay in registers: more of them than the latency
// of a multiply-add times its throughput, so that only the units themselves limit it. It takes
// some tens of microseconds and returns how many operations it did.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kSteps = 1 << 14;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;  // of 32 registers
#else
constexpr int kSums = 12;  // of 16
#endif

template <typename Scalar>
double vector_chunk() {
  using Vector [[gnu::vector_size(kVectorBytes)]] = Scalar;
  // Volatile: sums that the compiler knows to be equal become one. All tend to 1, far from
  // subnormal numbers.
  volatile Scalar half = 0.5;
  const Vector factor = half - Vector{};
  const Vector term = half - Vector{};
  Vector sums[kSums];
  for (Vector& sum : sums) {
    sum = half - Vector{};
  }
  for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
    for (Vector& sum : sums) {
      sum = sum * factor + term;
    }
  }
  Vector total = {};
  for (const Vector& sum : sums) {
    total += sum;
  }
  volatile Scalar sink = total[0];
  static_cast<void>(sink);
  return 2.0 * kSteps * kSums * (kVectorBytes / sizeof(Scalar));
}

#if defined(__AVX512BF16__)
double avx512_bf16_chunk() {
  volatile float one = 1;
  const __m512bh ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(one), _mm512_set1_ps(one));
  __m512 sums[kSums];
  for (__m512& sum : sums) {
    sum = _mm512_set1_ps(one);
  }
  for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
    for (__m512& sum : sums) {
      sum = _mm512_dpbf16_ps(sum, ones, ones);
    }
  }
  __m512 total = _mm512_setzero_ps();
  for (const __m512& sum : sums) {
    total = _mm512_add_ps(total, sum);
  }
  volatile float sink = _mm512_reduce_add_ps(total);
  static_cast<void>(sink);
  return 2.0 * kSteps * kSums * 32;
}
#endif

#if defined(__AMX_BF16__)
// Linux gives the tiles to a process that asks for them, once for all its threads.
bool amx_is_permitted() {
  constexpr int kRequestPermission = 0x1023;
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Eight tiles of 16 rows of 64 bytes. Not a local: g++ 12's intrinsic declares that it reads 8 of
// these 64 bytes, so that the stores of a local's others are removed as dead.
struct TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) constexpr TileShapes kTileShapes;

double amx_bf16_chunk() {
  _tile_loadconfig(&kTileShapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  constexpr int64_t kTileSteps = kSteps / 16;
  for (int64_t step = 0; step < kTileSteps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * kTileSteps * 4 * (16 * 16 * 32);
}
#endif

// Operations a second of `threads` threads that run `chunk` for `seconds` at once.
double rate(double (*chunk)(), int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(threads);
  std::atomic<int> missing{threads};
  const auto work = [&](int thread) {
    chunk();  // wakes the wide units, which take a while to reach their clock
    --missing;
    while (missing > 0) {
      std::this_thread::yield();
    }
    const auto start = Clock::now();
    double done = 0;
    double elapsed = 0;
    while (elapsed < seconds) {
      done += chunk();
      elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    }
    rates[thread] = done / elapsed;
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) {
    others.emplace_back(work, thread);
  }
  work(0);
  for (std::thread& other : others) {
    other.join();
  }
  double total = 0;
  for (const double one : rates) {
    total += one;
  }
  return total;
}

// The best rate of several runs for each kind of unit that this processor has.
std::vector<std::pair<std::string, double>> peaks(int threads, double seconds, int runs) {
  std::vector<std::pair<std::string, double (*)()>> chunks = {
      {"float32", vector_chunk<float>}, {"float64", vector_chunk<double>}};
#if defined(__AVX512BF16__)
  chunks.emplace_back("AVX-512 bfloat16", avx512_bf16_chunk);
#endif
#if defined(__AMX_BF16__)
  if (amx_is_permitted()) {
    chunks.emplace_back("AMX bfloat16", amx_bf16_chunk);
  }
#endif
  std::vector<std::pair<std::string, double>> best;
  for (const auto& [name, chunk] : chunks) {
    double most = 0;
    for (int run = 0; run < runs; ++run) {
      most = std::max(most, rate(chunk, threads, seconds));
    }
    best.emplace_back(name, most);
  }
  return best;
}

}  // namespace
