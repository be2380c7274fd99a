// Element types on the GPU: to float and back, vectors of 16 bytes, and the way from a dtype's name to a C++ type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "numbers.h"

namespace gdl {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// How many elements one 16-byte access moves.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// V neighbours as they are in memory: one element, or 16 bytes. Kept as words, because the compiler gives every 16-bit
// member of a struct a register of its own.
template <typename T, int V>
struct Vector {
  static_assert(V == kVector<T>);
  uint4 words;
};
template <typename T>
struct Vector<T, 1> {
  T value;
};

// The address must be a multiple of the vector's size.
template <int V, typename T>
__device__ Vector<T, V> load(const T* in) {
  return *reinterpret_cast<const Vector<T, V>*>(in);
}

template <typename T, int V>
__device__ void store(T* out, const Vector<T, V>& vector) {
  *reinterpret_cast<Vector<T, V>*>(out) = vector;
}

template <typename T>
__device__ void widen(const Vector<T, 1>& vector, float (&out)[1]) {
  out[0] = to_float(vector.value);
}

__device__ inline void widen(const Vector<float, 4>& vector, float (&out)[4]) {
  const uint4 words = vector.words;
  out[0] = __uint_as_float(words.x);
  out[1] = __uint_as_float(words.y);
  out[2] = __uint_as_float(words.z);
  out[3] = __uint_as_float(words.w);
}

__device__ inline float2 widen_pair(std::uint32_t word, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ inline float2 widen_pair(std::uint32_t word, __nv_bfloat16) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
}

template <typename T>
__device__ void widen(const Vector<T, 8>& vector, float (&out)[8]) {
  const std::uint32_t words[4] = {vector.words.x, vector.words.y, vector.words.z, vector.words.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 pair = widen_pair(words[w], T());
    out[2 * w] = pair.x;
    out[2 * w + 1] = pair.y;
  }
}

template <typename T>
__device__ Vector<T, 1> narrow(const float (&in)[1]) {
  return {from_float<T>(in[0])};
}

template <typename T>
__device__ Vector<T, 4> narrow(const float (&in)[4]) {
  return {make_uint4(__float_as_uint(in[0]), __float_as_uint(in[1]), __float_as_uint(in[2]), __float_as_uint(in[3]))};
}

__device__ inline std::uint32_t narrow_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ inline std::uint32_t narrow_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

template <typename T>
__device__ Vector<T, 8> narrow(const float (&in)[8]) {
  return {make_uint4(narrow_pair(in[0], in[1], T()), narrow_pair(in[2], in[3], T()), narrow_pair(in[4], in[5], T()),
                     narrow_pair(in[6], in[7], T()))};
}

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the T that PyTorch calls `dtype`.
template <typename F>
auto dispatch(const std::string& dtype, F f) {
  if (dtype == "float32") return f(Type<float>{});
  if (dtype == "float16") return f(Type<__half>{});
  if (dtype == "bfloat16") return f(Type<__nv_bfloat16>{});
  throw std::invalid_argument("no CUDA kernel for dtype " + dtype);
}

// Calls f(Type<T>{}) for the type of numbers beside images. The same for all threads.
template <typename F>
__device__ void with_type(NumberType type, F f) {
  if (type == NumberType::kFloat)
    f(Type<float>{});
  else if (type == NumberType::kHalf)
    f(Type<__half>{});
  else
    f(Type<__nv_bfloat16>{});
}

// Two neighbours of 16 bits.
__device__ inline float2 widen_pair(std::uint32_t word, NumberType type) {
  return type == NumberType::kHalf ? widen_pair(word, __half()) : widen_pair(word, __nv_bfloat16());
}

}  // namespace gdl
