#include "huge_pages.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mylayers::cpu {

bool wants_huge_pages() {
#if defined(MADV_HUGEPAGE)
  static const bool wanted = [] {
    const char* value = std::getenv("MYLAYERS_HUGE_PAGES");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  return wanted;
#else
  return false;
#endif
}

void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  // Of x86, and of Arm with pages of 4 KiB. Only pages wholly inside: no byte more than was
  // allocated is ever backed by memory.
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < 2 * kPage || !wants_huge_pages()) {
    return;
  }
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + bytes) / kPage * kPage;
  if (first < last) {
    // A refusal (a kernel without huge pages) costs speed only.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

}  // namespace mylayers::cpu
