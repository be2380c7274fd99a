// Loops over a line of numbers of any dtype, written once: in vectors, and the last few one by one.
//
// An expression is a generic lambda of `at`, a place in the line. at(p) is what lies there behind a pointer, widened: a
// vector, or a number near the end. at(c) of a number is that number everywhere. So one expression serves parameters
// that are the same along the line and such as change.
#pragma once

#include <algorithm>
#include <array>

#include "half.h"
#include "vec.h"

namespace gdl {

template <typename T>
struct VectorAt {
  std::int64_t i;

  template <typename E>
  Vec<T> operator()(const E* p) const {
    return load_widened(p + i);
  }
  T operator()(T constant) const { return constant; }
};

template <typename T>
struct NumberAt {
  std::int64_t i;

  template <typename E>
  T operator()(const E* p) const {
    return to_accumulator(p[i]);
  }
  T operator()(T constant) const { return constant; }
};

// A sum is started anew after so many additions, and the sums are added up: rounding errors stay small.
constexpr int kAdditions = 16;

// The sums over i < n of each term, in several chains: one addition need not wait for the one before.
template <typename T, typename... Terms>
[[gnu::always_inline]] inline std::array<T, sizeof...(Terms)> sum_up(std::int64_t n, Terms... terms) {
  constexpr int count = sizeof...(Terms), width = kWidth<T>;
  constexpr int chains = count <= 2 ? 4 : 2;  // with what the terms need, they fit the 16 registers of AVX2
  constexpr int step = chains * width;
  Vec<T> totals[count];
  for (auto& total : totals) total = Vec<T>{};
  std::int64_t i = 0;
  while (i + step <= n) {
    Vec<T> sums[chains][count];
    for (auto& chain : sums)
      for (auto& sum : chain) sum = Vec<T>{};
    for (const std::int64_t end = i + std::min<std::int64_t>(kAdditions, (n - i) / step) * step; i < end; i += step) {
#pragma GCC unroll 4
      for (int j = 0; j < chains; ++j) {
        const VectorAt<T> at{i + j * width};
        int k = 0;
        ((sums[j][k++] += terms(at)), ...);
      }
    }
    for (int k = 0; k < count; ++k) {
      for (int j = 1; j < chains; ++j) sums[0][k] += sums[j][k];
      totals[k] += sums[0][k];
    }
  }
  for (; i + width <= n; i += width) {
    int k = 0;
    ((totals[k++] += terms(VectorAt<T>{i})), ...);
  }
  std::array<T, count> rest{};
  for (; i < n; ++i) {
    int k = 0;
    ((rest[k++] += terms(NumberAt<T>{i})), ...);
  }
  for (int k = 0; k < count; ++k) rest[k] += reduce_sum<T>(totals[k]);
  return rest;
}

// out[i] = value(at i), rounded. Returns the sums over i < n of each term(at i, value before rounding).
template <typename E, typename Value, typename... Terms, typename T = accumulator_t<E>>
[[gnu::always_inline]] inline std::array<T, sizeof...(Terms)> write(E* out, std::int64_t n, Value value,
                                                                    Terms... terms) {
  constexpr int count = sizeof...(Terms), width = kWidth<T>;
  Vec<T> totals[count + 1];
  for (auto& total : totals) total = Vec<T>{};
  std::int64_t i = 0;
  while (i + width <= n) {
    Vec<T> sums[count + 1];
    for (auto& sum : sums) sum = Vec<T>{};
    for (const std::int64_t end = i + std::min<std::int64_t>(kAdditions, (n - i) / width) * width; i < end;
         i += width) {
      const VectorAt<T> at{i};
      const Vec<T> v = value(at);
      store_rounded(out + i, v);
      [[maybe_unused]] int k = 0;
      ((sums[k++] += terms(at, v)), ...);
    }
    for (int k = 0; k < count; ++k) totals[k] += sums[k];
  }
  std::array<T, count> rest{};
  for (; i < n; ++i) {
    const NumberAt<T> at{i};
    const T v = value(at);
    out[i] = from_accumulator<E>(v);
    [[maybe_unused]] int k = 0;
    ((rest[k++] += terms(at, v)), ...);
  }
  for (int k = 0; k < count; ++k) rest[k] += reduce_sum<T>(totals[k]);
  return rest;
}

}  // namespace gdl
