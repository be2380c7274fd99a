// Short vectors of float or double, as wide as the variant that is being compiled allows, over GCC's vector extensions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace gdl {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  using Int = std::int32_t;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef Int IntVec __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / 4;
  static constexpr int mantissa = 23;
};

template <>
struct Lanes<double> {
  using Int = std::int64_t;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef Int IntVec __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / 8;
  static constexpr int mantissa = 52;
};

template <typename T>
using Vec = typename Lanes<T>::Vec;
template <typename T>
using IntVec = typename Lanes<T>::IntVec;
template <typename T>
constexpr int kWidth = Lanes<T>::width;

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <typename T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 keeps the sign of zero, x + 0 does not
}

// b where either is NaN. Spelt with the instruction: GCC makes a comparison and a blend of the plain expression.
template <typename T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_max_ps(a, b);
  else
    return _mm512_max_pd(a, b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return _mm256_max_ps(a, b);
  else
    return _mm256_max_pd(a, b);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4)
    return _mm_max_ps(a, b);
  else
    return _mm_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

// Of a vector, or of a number.
inline Vec<float> square_root(Vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(v);
#else
  for (int i = 0; i < kWidth<float>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}
inline Vec<double> square_root(Vec<double> v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_pd(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(v);
#elif defined(__SSE2__)
  return _mm_sqrt_pd(v);
#else
  for (int i = 0; i < kWidth<double>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }

// The lanes 0, 1, 2, ...
template <typename T>
inline IntVec<T> lane_index() {
  IntVec<T> index;
  for (int i = 0; i < kWidth<T>; ++i) index[i] = i;
  return index;
}

template <typename T>
inline T reduce_maximum(Vec<T> v) {
  for (int n = kWidth<T> / 2; n > 0; n /= 2) v = maximum<T>(v, __builtin_shuffle(v, lane_index<T>() ^ n));
  return v[0];
}

// Pairwise, so the order of additions is fixed by the width.
template <typename T>
inline T reduce_sum(Vec<T> v) {
  for (int n = kWidth<T> / 2; n > 0; n /= 2) v += __builtin_shuffle(v, lane_index<T>() ^ n);
  return v[0];
}

// Lane i: the sum of v[i], for as many vectors as a vector has lanes. Neighbours are added, then neighbouring sums.
template <typename T, int count = kWidth<T>>
[[gnu::always_inline]] inline Vec<T> reduce_sums(const Vec<T>* v) {
  if constexpr (count == 1) {
    return v[0];
  } else {
    const IntVec<T> even = 2 * lane_index<T>();
    Vec<T> half[count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i)
      half[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], even + 1);
    return reduce_sums<T, count / 2>(half);
  }
}

// 2^f on [-1/2, 1/2], lowest power first: Chebyshev interpolation, relative error 3e-9 (float, before rounding) and
// 2e-17.
template <typename T>
struct Exp2Polynomial;
template <>
struct Exp2Polynomial<float> {
  static constexpr float c[] = {1.000000000e+00f, 6.931472067e-01f, 2.402265092e-01f, 5.550327227e-02f,
                                9.618056679e-03f, 1.340042818e-03f, 1.546144470e-04f};
};
template <>
struct Exp2Polynomial<double> {
  static constexpr double c[] = {1.00000000000000000e+00, 6.93147180559945286e-01, 2.40226506959101582e-01,
                                 5.55041086648216248e-02, 9.61812910758725638e-03, 1.33335581464064708e-03,
                                 1.54035304637243530e-04, 1.52527338415567733e-05, 1.32154325359123753e-06,
                                 1.01780570877339407e-07, 7.07419429728852106e-09, 4.45581790833606449e-10};
};

// 2^x for x <= some hundreds. Exactly 0 for x <= -127 (-1023), -inf included; NaN stays NaN.
template <typename T>
inline Vec<T> exp2(Vec<T> x) {
  constexpr int bits = Lanes<T>::mantissa;
  constexpr T magic = T(3) * (std::int64_t(1) << (bits - 1));  // adding it rounds to an integer, kept in the low bits
  // Down here the exponent's field is 0 and the polynomial is exactly 1, which leaves no bit set.
  x = maximum<T>(broadcast<T>(sizeof(T) == 4 ? T(-127) : T(-1023)), x);
  const Vec<T> shifted = x + magic;
  const Vec<T> f = x - (shifted - magic);
  constexpr int degree = sizeof(Exp2Polynomial<T>::c) / sizeof(T) - 1;
  Vec<T> p = broadcast<T>(Exp2Polynomial<T>::c[degree]);
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) p = p * f + Exp2Polynomial<T>::c[k];
  return (Vec<T>)((IntVec<T>)p + ((IntVec<T>)shifted << bits));
}

}  // namespace gdl
