// Pixel norm on the CPU: y = x * r, r = 1 / sqrt(mean_c(x^2) + eps), and its gradient.
#pragma once

#include <cstdint>

namespace gdl {

// An image tensor (N, C, P) as lines of numbers next to each other in memory: the pixels of a channel, or with
// channels_last the channels of a pixel.
template <typename T>
struct Lines {
  T* data;
  std::int64_t image;  // stride from image to image, in elements
  std::int64_t line;   // stride from line to line

  T* at(std::int64_t n, std::int64_t l) const { return data + n * image + l * line; }
};

struct Images {
  std::int64_t count, channels, pixels;
  bool channels_last;
};

// T: float, double, float16 or bfloat16. Sums are kept in float, in double for double.
template <typename T>
void pixel_norm_forward(Images images, double eps, Lines<const T> x, Lines<T> y, int threads);

// dx = r * (g - r x * mean_c(g * r x))
template <typename T>
void pixel_norm_backward(Images images, double eps, Lines<const T> grad, Lines<const T> x, Lines<T> dx, int threads);

}  // namespace gdl
