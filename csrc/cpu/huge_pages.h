// Large outputs on huge pages: of fresh memory every page that is written first costs a fault.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace gdl {

// Asks for huge pages behind those parts of an allocation that are whole ones. A refusal changes nothing but the time.
inline void want_huge_pages(void* start, std::size_t bytes) {
  constexpr std::uintptr_t page = 2 << 20;
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(start);
  const std::uintptr_t first = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

}  // namespace gdl
