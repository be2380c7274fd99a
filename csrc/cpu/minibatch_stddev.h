// Minibatch standard deviation on the CPU: the input, and channels that tell how much samples differ; its gradient.
#pragma once

#include "../images.h"

namespace gdl {

// N = group * M samples; sample g * M + m is member g of group m. C / features neighbouring channels make a feature.
struct Grouping {
  std::int64_t group, features;
};

// y has the images of x and `features` more channels, each the mean over a feature's channels and pixels of
// sqrt(var_g(x) + eps), the same for all members of a group. T: float, double, float16 or bfloat16. Sums are kept in
// float, in double for double.
template <typename T>
void minibatch_stddev_forward(Images images, Grouping grouping, double eps, Lines<const T> x, Lines<T> y, int threads);

// dx = grad_copied + (x - mean_g) / (group * sqrt(var_g + eps)) * sum(grad of the statistic) / (C / features * pixels)
template <typename T>
void minibatch_stddev_backward(Images images, Grouping grouping, double eps, Lines<const T> grad, Lines<const T> x,
                               Lines<T> dx, int threads);

}  // namespace gdl
