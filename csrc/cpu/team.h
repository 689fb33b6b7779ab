// One parallel region whose threads wait for each other, where at::parallel_for would start one
// region per pass.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace mylayers::cpu {

// What one thread of a region knows of it.
class Team {
 public:
  // body(team) on every thread; on the caller's alone for one share, inside another parallel
  // region, or in a build without OpenMP. `shares` are the threads that get work; the others
  // only meet at the barriers, which is why the body must pass all of them and throw nothing.
  template <class Body>
  static void run(int64_t shares, const Body& body) {
#if defined(_OPENMP) && AT_PARALLEL_OPENMP
    if (shares > 1 && threads() > 1) {
      // No num_threads clause: at::parallel_for avoids it too (pytorch#32008).
#pragma omp parallel
      body(Team(omp_get_thread_num(), std::min<int64_t>(shares, omp_get_num_threads()), false));
      return;
    }
#endif
    body(Team(0, 1, true));
  }

  // As many as a region started here would have.
  static int64_t threads() {
    at::internal::lazy_init_num_threads();
    return at::in_parallel_region() ? 1 : at::get_num_threads();
  }

  // This thread's part of `count` items: adjacent ones, [first, second).
  std::pair<int64_t, int64_t> share(int64_t count) const {
    return rank_ < size_ ? std::pair(count * rank_ / size_, count * (rank_ + 1) / size_)
                         : std::pair<int64_t, int64_t>(0, 0);
  }

  // What other threads wrote before theirs can be read after it.
  void barrier() const {
#if defined(_OPENMP) && AT_PARALLEL_OPENMP
    if (!alone_) {  // it would be the barrier of a region around this one
#pragma omp barrier
    }
#endif
  }

 private:
  Team(int64_t rank, int64_t size, bool alone) : rank_(rank), size_(size), alone_(alone) {}

  int64_t rank_, size_;
  [[maybe_unused]] bool alone_;
};

}  // namespace mylayers::cpu
