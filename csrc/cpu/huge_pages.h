// Fresh memory on Linux comes in pages of 4 KiB, each faulted in at its first touch, and the faults
// take longer than the writing. Huge pages are fewer faults. [lab: huge-pages]
#pragma once

#include <cstddef>

#include "../export.h"

namespace mylayers::cpu {

// Whether huge pages are asked for: on Linux, unless MYLAYERS_HUGE_PAGES=0 (read once).
MYLAYERS_API bool wants_huge_pages();

// Before the first touch of fresh memory: the kernel may back by huge pages what of it they can
// fill. Does nothing for less memory than surely holds one, and to memory already touched.
MYLAYERS_API void prefer_huge_pages(void* memory, size_t bytes);

}  // namespace mylayers::cpu
