#pragma once

#include <cstdint>

namespace mylayers {

// Memory as center sees it, passed through in its own order: (lead, outer, count, inner), the mean
// over `lead` and `count`. One of lead and inner is 1.
struct CenterSizes {
  int64_t lead = 1, outer = 1, count = 1, inner = 1;

  int64_t elements() const { return lead * outer * count * inner; }
};

}  // namespace mylayers
