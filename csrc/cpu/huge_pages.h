// Pages of 2 MB for memory that a kernel is about to fill.
//
// A large tensor's memory is new to the process, and the first touch of each of its pages costs a trip into the system:
// in pages of 4 KB more than the kernel itself. Where the system leaves the choice to the process, as most do, it has
// to be asked for large ones.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gdl {

inline void prefer_huge_pages([[maybe_unused]] std::uintptr_t address, [[maybe_unused]] std::uintptr_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 2 << 20;
  const std::uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  // A system that has no such pages refuses, which is no error.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace gdl
