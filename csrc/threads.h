// How many of the CPU's threads a pass is worth.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gdl {

// Elements that are worth a thread; PyTorch's own grain.
constexpr std::int64_t kGrain = 32768;

inline int threads_for(std::int64_t elements, int available) {
  return static_cast<int>(std::min<std::int64_t>(available, 1 + elements / kGrain));
}

}  // namespace gdl
