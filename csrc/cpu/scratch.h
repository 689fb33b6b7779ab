// Memory for one call: on the stack where it is small, else from PyTorch's allocator, with its
// alignment and its out-of-memory error.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "huge_pages.h"

namespace mylayers::cpu {

template <class C>
class Scratch {
 public:
  // Uninitialised.
  explicit Scratch(int64_t count) {
    const size_t bytes = count > 0 ? count * sizeof(C) : 0;
    if (bytes > kOnStack) {
      memory_ = c10::GetCPUAllocator()->allocate(bytes);
      prefer_huge_pages(memory_.get(), bytes);
    }
    begin_ = bytes > kOnStack ? static_cast<C*>(memory_.get()) : reinterpret_cast<C*>(stack_);
  }
  Scratch(int64_t count, C value) : Scratch(count) { std::fill_n(get(), count, value); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  C* get() const { return begin_; }
  C& operator[](int64_t i) const { return begin_[i]; }

 private:
  // A panel of 64 x 64 float32, or the rows between two small layers: the allocator would take a
  // tenth of a microsecond for each.
  static constexpr size_t kOnStack = 16 << 10;

  alignas(64) std::byte stack_[kOnStack];
  c10::DataPtr memory_;
  C* begin_;
};

}  // namespace mylayers::cpu
