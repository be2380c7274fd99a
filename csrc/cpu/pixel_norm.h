// Pixel norm on the CPU: y = x * r, r = 1 / sqrt(mean_c(x^2) + eps), and its gradient.
#pragma once

#include "../images.h"

namespace gdl {

// T: float, double, float16 or bfloat16. Sums are kept in float, in double for double.
template <typename T>
void pixel_norm_forward(Images images, double eps, Lines<const T> x, Lines<T> y, int threads);

// dx = r * (g - r x * mean_c(g * r x))
template <typename T>
void pixel_norm_backward(Images images, double eps, Lines<const T> grad, Lines<const T> x, Lines<T> dx, int threads);

}  // namespace gdl
