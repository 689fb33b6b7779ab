// Memory for one call, from PyTorch's allocator: its alignment, its out-of-memory error.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>

#include "huge_pages.h"

namespace mylayers::cpu {

template <class C>
class Scratch {
 public:
  // Uninitialised.
  explicit Scratch(int64_t count) {
    if (count > 0) {
      const size_t bytes = count * sizeof(C);
      memory_ = c10::GetCPUAllocator()->allocate(bytes);
      prefer_huge_pages(memory_.get(), bytes);
    }
  }
  Scratch(int64_t count, C value) : Scratch(count) { std::fill_n(get(), count, value); }

  C* get() const { return static_cast<C*>(memory_.get()); }
  C& operator[](int64_t i) const { return get()[i]; }

 private:
  c10::DataPtr memory_;
};

}  // namespace mylayers::cpu
