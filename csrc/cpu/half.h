// 16-bit floating point numbers on the CPU: storage types, and loops that widen to float and round back.
//
// Rounding is to nearest even, NaN stays NaN, and every variant of a build gives the same bits: the portable float16
// path agrees with the F16C instructions, signalling NaNs included, and neither depends on whether denormals are
// flushed.
#pragma once

#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace gdl {

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

// What sums are kept in.
template <typename T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename accumulator<T>::type;

inline std::uint32_t float_bits(float value) { return __builtin_bit_cast(std::uint32_t, value); }
inline float bits_float(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline double to_accumulator(double value) { return value; }
inline float to_accumulator(float value) { return value; }
inline float to_accumulator(bfloat16 value) { return bits_float(static_cast<std::uint32_t>(value.bits) << 16); }

// Selects, not branches: GCC vectorises loops over these.
inline float to_accumulator(float16 value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  const std::uint32_t shifted = magnitude << 13;
  const std::uint32_t normal = shifted + (112u << 23);
  // A subnormal is m * 2^-24: put m below the leading one of 2^-14 and take that away again.
  const std::uint32_t subnormal = float_bits(bits_float(shifted + (113u << 23)) - 0x1p-14f);
  const std::uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
  const std::uint32_t special = (shifted + (224u << 23)) | quiet;
  const std::uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return bits_float(sign | (magnitude < 0x7c00u ? finite : special));
}

template <typename T>
T from_accumulator(accumulator_t<T> value);

template <>
inline double from_accumulator<double>(double value) {
  return value;
}

template <>
inline float from_accumulator<float>(float value) {
  return value;
}

template <>
inline bfloat16 from_accumulator<bfloat16>(float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t nan = (bits >> 16) | 0x0040u;
  return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
inline float16 from_accumulator<float16>(float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Floats next to 1/2 are 2^-24 apart, as float16's subnormals are: the addition does the rounding.
  const std::uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const std::uint32_t bounded = magnitude < 0x477ff000u ? finite : 0x7c00u;
  return {static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000u ? nan : bounded))};
}

// A vector of contiguous numbers, widened. Spelt with the instructions: GCC takes the plain conversion apart.
template <typename E, typename T = accumulator_t<E>>
inline Vec<T> load_widened(const E* from) {
  if constexpr (std::is_same_v<E, T>) {
    return load(from);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<E, bfloat16>) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (Vec<T>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  } else {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  } else if constexpr (std::is_same_v<E, bfloat16>) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Vec<T>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  } else {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  } else {
    T wide[kWidth<T>];
    for (int i = 0; i < kWidth<T>; ++i) wide[i] = to_accumulator(from[i]);
    return load(wide);
#endif
  }
}

// A vector of numbers, rounded to E, to contiguous memory. Spelt with the instructions, as load_widened is.
template <typename E, typename T = accumulator_t<E>>
inline void store_rounded(E* to, Vec<T> value) {
  if constexpr (std::is_same_v<E, T>) {
    store<T>(to, value);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<E, bfloat16>) {
    const IntVec<T> bits = (IntVec<T>)value;
    const IntVec<T> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x0040;
    const IntVec<T> chosen = (bits & 0x7fffffff) > 0x7f800000 ? nan : rounded;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)chosen));
  } else {
    const __m256i halves = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
#elif defined(__AVX2__)
  } else if constexpr (std::is_same_v<E, bfloat16>) {
    const IntVec<T> bits = (IntVec<T>)value;
    const IntVec<T> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x0040;
    const __m256i chosen = (__m256i)(((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded) & 0xffff);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  } else {
    const __m128i halves = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
#else
  } else {
    for (int i = 0; i < kWidth<T>; ++i) to[i] = from_accumulator<E>(value[i]);
#endif
  }
}

// n contiguous numbers, widened.
template <typename T>
inline void load(const T* __restrict in, accumulator_t<T>* __restrict out, std::int64_t n) {
  constexpr int width = kWidth<accumulator_t<T>>;
  std::int64_t i = 0;
  for (; i + width <= n; i += width) store<accumulator_t<T>>(out + i, load_widened(in + i));
  for (; i < n; ++i) out[i] = to_accumulator(in[i]);
}

// n contiguous numbers, rounded to T.
template <typename T>
inline void store(const accumulator_t<T>* __restrict in, T* __restrict out, std::int64_t n) {
  std::int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float16>) {
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; ++i) out[i] = from_accumulator<T>(in[i]);
}

}  // namespace gdl
