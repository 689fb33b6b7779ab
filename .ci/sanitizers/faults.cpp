// One fault of each sort that the sanitizers are there to find, and its sound counterpart:
// .ci/sanitize shows by them that it finds the former and is silent at the latter before it says
// anything of the library. Each is called by its name, from Python, as the library is.
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace {

// What the compiler must not foresee.
volatile int zero = 0;
volatile int sink = 0;
volatile int shared = 0;

}  // namespace

extern "C" {

void read_past_the_end() {
  auto* values = static_cast<float*>(std::malloc((17 + zero) * sizeof(float)));
  std::memset(values, 0, 17 * sizeof(float));
  typedef float Vector __attribute__((vector_size(64)));
  Vector v;
  std::memcpy(&v, values + 4 + zero, sizeof v);  // as kernels load: 3 values too many
  sink = static_cast<int>(v[15]);
  std::free(values);
}

void read_after_free() {
  auto* value = new int(1);
  delete value;
  sink = value[zero];
}

void write_past_the_stack() {
  volatile char bytes[16] = {};
  volatile char* end = bytes + 8;
  end[8 + zero] = 1;
  sink = bytes[0];
}

void overflow() {
  sink = INT_MAX - zero;
  sink = sink + 1;
}

void misaligned_load() {
  alignas(8) char bytes[16] = {};
  sink = static_cast<int>(*reinterpret_cast<int64_t*>(bytes + 1 + zero));
}

// Of memory that comes as a tensor's does, one piece with its guard in front and one behind.
void write_before_or_behind_a_tensor() {
  for (int turn = 0; turn < 2; ++turn) {
    void* memory = nullptr;
    sink = posix_memalign(&memory, 64, 68 + zero);
    volatile float* values = static_cast<float*>(memory);
    values[17 + zero] = 1;
    values[-1 + zero] = 1;
    std::free(memory);
  }
}

void read_a_freed_tensor() {
  void* memory = nullptr;
  sink = posix_memalign(&memory, 64, 68 + zero);
  volatile float* values = static_cast<float*>(memory);
  values[zero] = 1;
  std::free(memory);
  sink = static_cast<int>(values[zero]);
}

// Many times: of two accesses in the very same moment ThreadSanitizer may see none.
void race() {
  const auto count = [] {
    for (int i = 0; i < 1000; ++i) {
      shared = shared + 1;
    }
  };
  std::thread other(count);
  count();
  other.join();
}

void race_in_a_region() {
  int sum = 0;
#pragma omp parallel num_threads(4)
  for (int i = 0; i < 1000; ++i) {
    sum += 1;
  }
  sink = sum;
}

void sound() {
  void* memory = nullptr;
  sink = posix_memalign(&memory, 64, 64);
  auto* values = static_cast<char*>(memory);
  std::memset(values, 1, 64);
  int64_t value = 0;
  std::memcpy(&value, values + 1 + zero, sizeof value);
  sink = static_cast<int>(value);
  std::free(values);
  std::thread other([] { shared = shared + 1; });
  other.join();
  shared = shared + 1;
}

// What the kernels do: values of the caller read by all threads, others' values after a barrier,
// all of them by the caller after the region.
void sound_region() {
  for (int turn = 0; turn < 50; ++turn) {
    int given = turn, partial[4] = {}, sums[4] = {};
#pragma omp parallel for num_threads(4)
    for (int i = 0; i < 4; ++i) {
      partial[i] = given + i;
    }
#pragma omp parallel num_threads(4)
    {
#pragma omp for schedule(static) nowait
      for (int i = 0; i < 4; ++i) {
        partial[i] += given;
      }
#pragma omp barrier
#pragma omp for schedule(static) nowait
      for (int i = 0; i < 4; ++i) {
        sums[i] = partial[0] + partial[1] + partial[2] + partial[3];
      }
    }
    sink = sums[0] + sums[3] + partial[1];
  }
}

}  // extern "C"
