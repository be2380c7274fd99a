// What kernels share that work on tiles packed into scratch memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "vec.h"

namespace gdl {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// n rounded up to whole vectors.
template <typename T>
constexpr int padded(std::int64_t n) {
  return static_cast<int>((n + kWidth<T> - 1) / kWidth<T> * kWidth<T>);
}

// to[j][i] = from[i][j]
template <typename T>
inline void transpose(const T* __restrict from, int ld_from, T* __restrict to, int ld_to, int rows, int columns) {
  for (int j0 = 0; j0 < columns; j0 += 16)
    for (int i = 0; i < rows; ++i)
      for (int j = j0; j < (j0 + 16 < columns ? j0 + 16 : columns); ++j) to[j * ld_to + i] = from[i * ld_from + j];
}

// Calls work(task) for every task from 0 to count - 1; whoever is free takes the next. make_scratch runs once a thread.
template <typename MakeScratch, typename Work>
void parallel_for(int threads, std::int64_t count, MakeScratch make_scratch, Work work) {
  if (threads > count) threads = static_cast<int>(count > 0 ? count : 1);
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
#pragma omp parallel num_threads(threads)
  {
    try {
      auto scratch = make_scratch();
      for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(task, scratch);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace gdl
