// How center's kernels, of any device, come to sizes.
#include "center.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace mylayers {
namespace {

// Runs this long are worth a sum each, where means run over dimensions on both sides of one that
// they leave.
constexpr int64_t kShortestRun = 32;

}  // namespace

std::optional<CenterSizes> center_sizes(const at::Tensor& input, at::IntArrayRef dims) {
  c10::SmallVector<int64_t, 6> order(input.dim());
  std::iota(order.begin(), order.end(), 0);
  if (!input.is_contiguous()) {
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return input.stride(a) > input.stride(b);
    });
  }
  // Neighbours that are averaged alike are one: kept and averaged by turns.
  c10::SmallVector<int64_t, 6> parts = {1};
  bool averaged = false;
  for (const int64_t d : order) {
    if (input.size(d) == 1) {
      continue;
    }
    if (averaged != std::binary_search(dims.begin(), dims.end(), d)) {
      averaged = !averaged;
      parts.push_back(1);
    }
    parts.back() *= input.size(d);
  }
  if (parts.size() == 1) {  // means of one value each
    return CenterSizes{1, 1, 1, parts[0]};
  }
  parts.resize(std::max<size_t>(parts.size(), 3), 1);
  if (parts.size() == 3) {
    return CenterSizes{1, parts[0], parts[1], parts[2]};
  }
  if (parts.size() == 4 && parts[0] == 1 && parts[3] >= kShortestRun) {
    return CenterSizes{parts[1], parts[2], parts[3], 1};
  }
  return std::nullopt;
}

at::Tensor center_moved(
    const at::Tensor& input, at::IntArrayRef dims, const at::Tensor& output,
    CenterFunction* kernel) {
  std::vector<int64_t> order, last;
  for (int64_t d = 0; d < input.dim(); ++d) {
    if (std::find(dims.begin(), dims.end(), d) == dims.end()) {
      order.push_back(d);
    }
  }
  for (const int64_t d : dims) {
    last.push_back(static_cast<int64_t>(order.size()));
    order.push_back(d);
  }
  output.permute(order).copy_(kernel(input.permute(order).contiguous(), last));
  return output;
}

}  // namespace mylayers
