// C = A B and C += A B on tiles that sit in the caches: the matrix products of attention.
//
// A is read one element at a time and broadcast, so it may lie either way round (row_a and col_a are its strides): a
// transposed left side needs no copy. Rows of B and C are contiguous, and n is a multiple of the vector width. A tile
// of C stays in registers over all of k.
//
// `next` is the right side of the product that comes after: while this one computes, its lines are fetched into the L2.
// Panels of one head outgrow it.
//
// Operands are float, double, or pairs of bfloat16 where the CPU multiplies those: then k counts pairs, A holds the
// pairs of a row, a row of B the pairs (b[2p][j], b[2p + 1][j]), and sums are float.
#pragma once

#include <type_traits>

#include "half.h"
#include "vec.h"

// A test defines GDL_EMULATE_BF16_DOT, to run what a CPU without the instruction can't.
#if defined(__AVX512BF16__) || defined(GDL_EMULATE_BF16_DOT)
#define GDL_BF16_DOT 1
#endif

namespace gdl {

struct Bf16Pair {
  bfloat16 first, second;
};

// What the products of these operands are summed in.
template <typename X>
using Sum = std::conditional_t<std::is_same_v<X, Bf16Pair>, float, X>;

template <typename X>
struct OperandVec {
  using type = Vec<X>;
};
template <>
struct OperandVec<Bf16Pair> {
  using type = IntVec<float>;
};

template <typename X>
inline typename OperandVec<X>::type load_operands(const X* p) {
  typename OperandVec<X>::type v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec<float> multiply_add(Vec<float> sum, Bf16Pair a, IntVec<float> b) {
  const IntVec<float> both = __builtin_bit_cast(std::int32_t, a) - IntVec<float>{};
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)both, (__m512bh)b);
#else
  const auto high = [](IntVec<float> v) { return (Vec<float>)(v & static_cast<std::int32_t>(0xffff0000)); };
  return sum + high(both << 16) * high(b << 16) + high(both) * high(b);
#endif
}

// Rows of a register tile that is `columns` vectors wide: it, a row of B and one broadcast element fit the registers.
template <int columns>
constexpr int kTileRows =
    (kVectorRegisters - columns - 2) / columns > 12 ? 12 : (kVectorRegisters - columns - 2) / columns;

template <typename X>
constexpr int kCacheLine = 64 / sizeof(X);

template <typename X, int rows, int columns, bool accumulate>
[[gnu::always_inline]] inline void gemm_registers(int k, const X* __restrict a, long row_a, long col_a,
                                                  const X* __restrict b, long ld_b, Sum<X>* __restrict c, long ld_c,
                                                  const X* next) {
  using T = Sum<X>;
  Vec<T> sum[rows][columns];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) sum[i][j] = Vec<T>{};
  for (int p = 0; p < k; ++p) {
    __builtin_prefetch(next + p * kCacheLine<X>, 0, 2);
    typename OperandVec<X>::type line[columns];
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) line[j] = load_operands(b + p * ld_b + j * kWidth<T>);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const X x = a[i * row_a + p * col_a];
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j) {
        if constexpr (std::is_same_v<X, Bf16Pair>)
          sum[i][j] = multiply_add(sum[i][j], x, line[j]);
        else
          sum[i][j] += x * line[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) {
      T* to = c + i * ld_c + j * kWidth<T>;
      // C is added last: a long sum made of short ones is rounded less often at its full size.
      store<T>(to, accumulate ? load(to) + sum[i][j] : sum[i][j]);
    }
}

template <bool accumulate, int columns, typename X, int rows = kTileRows<columns>>
void gemm_rows(int m, int k, const X* a, long row_a, long col_a, const X* b, long ld_b, Sum<X>* c, long ld_c,
               const X* next, const X* next_end) {
  for (; m >= rows; m -= rows, a += rows * row_a, c += rows * ld_c) {
    gemm_registers<X, rows, columns, accumulate>(k, a, row_a, col_a, b, ld_b, c, ld_c, next < next_end ? next : b);
    next += k * kCacheLine<X>;
  }
  if constexpr (rows > 1) {
    if (m > 0) gemm_rows<accumulate, columns, X, rows - 1>(m, k, a, row_a, col_a, b, ld_b, c, ld_c, next, next_end);
  }
}

// a: m x k, b: k x n, c: m x n; next: k x n, or null.
template <bool accumulate, typename X>
void gemm(int m, int n, int k, const X* a, long row_a, long col_a, const X* b, long ld_b, Sum<X>* c, long ld_c,
          const X* next = nullptr) {
  constexpr int width = kWidth<Sum<X>>;
  constexpr int widest = kVectorRegisters == 32 ? 4 : 2;
  const X* next_end = next == nullptr ? nullptr : next + static_cast<long>(k) * n;
  int j = 0;
  for (; j + widest * width <= n; j += widest * width) {
    gemm_rows<accumulate, widest>(m, k, a, row_a, col_a, b + j, ld_b, c + j, ld_c, next, next_end);
    next = next_end;
  }
  if (widest == 4 && j + 2 * width <= n) {
    gemm_rows<accumulate, 2>(m, k, a, row_a, col_a, b + j, ld_b, c + j, ld_c, next, next_end);
    j += 2 * width;
    next = next_end;
  }
  if (j < n) gemm_rows<accumulate, 1>(m, k, a, row_a, col_a, b + j, ld_b, c + j, ld_c, next, next_end);
}

}  // namespace gdl
