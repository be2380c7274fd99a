// Conditional batch norm on the CPU: the passes over memory of which forward, backward and double backward consist.
// What happens between them to numbers of planes and channels is in conditional_batch_norm.cpp.
#pragma once

#include "../images.h"
#include "half.h"

namespace gdl {

// Numbers of planes, that of channel c of image n at data[n * image + c]. Numbers of channels, which all images share,
// have 0 for `image`.
template <typename A>
struct Planes {
  const A* data;
  std::int64_t image;

  const A* at(std::int64_t n) const { return data + n * image; }
};

// A tensor in a linear combination.
template <typename T>
struct Term {
  Lines<const T> tensor;
  Planes<accumulator_t<T>> weight;
};

// Images are not empty. T: float, double, float16 or bfloat16; sums are kept in float, in double for double. The
// results do not depend on the number of threads.

// mean[c] and squares[c], the sum of squares about it, over images and pixels.
template <typename T>
void conditional_batch_norm_moments(Images images, Lines<const T> x, double* mean, double* squares, int threads);

// sums (2, N, C): over each plane's pixels, of grad and grad (x - mean). With a v, (5, N, C): also of v, v (x - mean)
// and v grad.
template <typename T>
void conditional_batch_norm_sums(Images images, const Lines<const T>* v, Lines<const T> grad, Lines<const T> x,
                                 const accumulator_t<T>* mean, accumulator_t<T>* sums, int threads);

// out = the sum of weight * tensor over `count` others, + weight * (x - mean), + offset. There are up to two others,
// and an x unless there is one other.
template <typename T>
void conditional_batch_norm_combine(Images images, const Term<T>* others, int count, const Term<T>* x,
                                    const accumulator_t<T>* mean, Planes<accumulator_t<T>> offset, Lines<T> out,
                                    int threads);

}  // namespace gdl
