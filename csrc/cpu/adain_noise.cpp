// Standard normal noise from a counter, by the transform of Box and Muller.
//
// Counter (q, image) gives four normal numbers, those of the pixels q, Q + q, 2 Q + q and 3 Q + q of a quarter's size
// Q: so each is written to memory in order. Logarithm, sine and cosine are polynomials, in float32 whatever T is.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "adain.h"
#include "philox.h"

namespace gdl {
namespace {

using Floats = Vec<float>;
using Ints = IntVec<float>;

constexpr std::uint32_t kStream = 0x6e6f6973;

// Powers of x from the lowest coefficient.
template <int size>
Floats polynomial(Floats x, const float (&c)[size]) {
  Floats sum = broadcast(c[size - 1]);
#pragma GCC unroll 8
  for (int k = size - 2; k >= 0; --k) sum = sum * x + c[k];
  return sum;
}

// ln x of normal numbers, by the series of 2 artanh(t) with t = (m - 1) / (m + 1), for m from sqrt(1/2) to sqrt(2).
Floats logarithm(Floats x) {
  constexpr std::int32_t root_half = 0x3f3504f3;
  const Ints bits = (Ints)x - root_half;
  const Ints exponent = bits >> 23;
  const Floats m = (Floats)((bits & 0x007fffff) + root_half);
  const Floats t = (m - 1.0f) / (m + 1.0f);
  const Floats series = polynomial(t * t, {2.0f, 2.0f / 3, 2.0f / 5, 2.0f / 7, 2.0f / 9});
  return t * series + __builtin_convertvector(exponent, Floats) * 0.693147180559945f;
}

struct SineCosine {
  Floats sine, cosine;
};

// Of 2 pi x, 0 <= x < 1: the series around the nearest quarter turn.
SineCosine of_turns(Floats x) {
  const Ints quarter = __builtin_convertvector(x * 4.0f + 0.5f, Ints);
  const Floats angle = (x - __builtin_convertvector(quarter, Floats) * 0.25f) * 6.28318530717959f;
  const Floats square = angle * angle;
  const Floats sine = angle * polynomial(square, {1.0f, -1.0f / 6, 1.0f / 120, -1.0f / 5040, 1.0f / 362880});
  const Floats cosine = polynomial(square, {1.0f, -1.0f / 2, 1.0f / 24, -1.0f / 720, 1.0f / 40320, -1.0f / 3628800});
  const Ints swapped = (quarter & 1) != 0;
  const Ints sine_sign = (quarter & 2) << 30, cosine_sign = ((quarter + 1) & 2) << 30;
  return {(Floats)((Ints)(swapped ? cosine : sine) ^ sine_sign),
          (Floats)((Ints)(swapped ? sine : cosine) ^ cosine_sign)};
}

struct Pair {
  Floats first, second;
};

Pair normal_pair(Words a, Words b) {
  const auto upper = [](Words w) { return __builtin_convertvector((Ints)(w >> 9), Floats); };
  const Floats log = logarithm((upper(a) + 0.5f) * 0x1p-23f);
  Floats radius;
  for (int i = 0; i < kWidth<float>; ++i) radius[i] = std::sqrt(-2.0f * log[i]);
  const SineCosine angle = of_turns(upper(b) * 0x1p-23f);
  return {radius * angle.cosine, radius * angle.sine};
}

}  // namespace

template <typename T>
void draw_noise(std::uint64_t seed, std::int64_t images, std::int64_t pixels, T* out, int threads) {
  const std::int64_t quarter = (pixels + 3) / 4;
  // Piece by piece, so that one image is shared among threads too.
  constexpr std::int64_t piece = 4096;
  const std::int64_t pieces = (quarter + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t task = 0; task < images * pieces; ++task) {
    const std::int64_t n = task / pieces, first = task % pieces * piece;
    T* image = out + n * pixels;
    for (std::int64_t q = first; q < std::min(quarter, first + piece); q += kWords) {
      const Words counter = (Words)lane_index<float>() + static_cast<std::uint32_t>(q);
      const PhiloxWords words = philox(seed, counter, static_cast<std::uint32_t>(n), 0, kStream);
      const Pair low = normal_pair(words.word[0], words.word[1]), high = normal_pair(words.word[2], words.word[3]);
      const Floats normals[4] = {low.first, low.second, high.first, high.second};
      const std::int64_t count = std::min<std::int64_t>(kWords, quarter - q);
      for (int k = 0; k < 4; ++k) {
        const std::int64_t to = k * quarter + q, fit = std::min(count, pixels - to);
        T values[kWords];
        for (int i = 0; i < kWords; ++i) values[i] = normals[k][i];
        if (fit == kWords)
          std::memcpy(image + to, values, sizeof values);
        else
          for (std::int64_t i = 0; i < fit; ++i) image[to + i] = values[i];
      }
    }
  }
}

template void draw_noise(std::uint64_t, std::int64_t, std::int64_t, float*, int);
template void draw_noise(std::uint64_t, std::int64_t, std::int64_t, double*, int);

}  // namespace gdl
