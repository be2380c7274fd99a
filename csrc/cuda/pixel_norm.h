// Pixel norm on the GPU: y = x * r, r = 1 / sqrt(mean_c(x^2) + eps), and its gradient. Sums are kept in float.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../images.h"

namespace gdl {

cudaError_t pixel_norm_forward(const std::string& dtype, Images images, float eps, Lines<const void> x, Lines<void> y,
                               cudaStream_t stream);

// dx = r * (g - r x * mean_c(g * r x))
cudaError_t pixel_norm_backward(const std::string& dtype, Images images, float eps, Lines<const void> grad,
                                Lines<const void> x, Lines<void> dx, cudaStream_t stream);

}  // namespace gdl
