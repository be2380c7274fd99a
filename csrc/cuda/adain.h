// Adaptive instance normalisation on the GPU, of x or of what StyleGAN's epilogue makes of it first:
//
//   u = x + weight[c] * noise[n, pixel] + bias[c],  h = u > 0 ? u : slope * u
//   y = scale * (h - mean) * rstd + shift,  mean and rstd = 1 / sqrt(variance + eps) of h over a plane
//
// and two gradients of it. Sums are kept in float. docs/adain_cuda.md says how planes are shared out among threads.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>

#include "../images.h"

namespace gdl {

// What happens to x before its statistics are taken.
struct Prologue {
  bool active;          // false: h = x
  const float* noise;   // (N or 1, pixels), or null
  std::int64_t image;   // from image to image of the noise: 0 where one serves all
  const float* weight;  // (C); null without noise
  const float* bias;    // (C), or null
  float slope;
};

// Of every plane: (N, C).
struct Modulation {
  const float *scale, *mean, *rstd;
};

// What one plane adds to the gradients of scale, shift, weight and bias. Without a prologue the last two are zero.
struct PlaneGradients {
  float *scale, *shift, *weight, *bias;
};

struct PlaneDirections {
  const float *scale, *shift, *weight, *bias;
};

struct AdainForward {
  Lines<const void> x;
  const float *scale, *shift;
  Prologue prologue;
  float eps;
  Lines<void> y;
  float *mean, *rstd;
};

// deviation = sqrt(variance + eps)
struct AdainStatistics {
  Lines<const void> x;
  float eps;
  float *mean, *deviation;
};

struct AdainBackward {
  Lines<const void> grad, x;
  Modulation modulation;
  Prologue prologue;
  Lines<void> dx;
  PlaneGradients gradients;
};

// Of <v, dx> + sum over planes of v_scale dscale + v_shift dshift + v_weight dweight + v_bias dbias. The gradient of
// shift is zero, and not written.
struct AdainDoubleBackward {
  Lines<const void> v;
  PlaneDirections directions;
  Lines<const void> grad, x;
  Modulation modulation;
  Prologue prologue;
  Lines<void> grad_grad, grad_x;
  PlaneGradients gradients;
};

// Memory on the GPU for so many floats, at least until the kernels that were launched have run. Asked for only where
// planes do not fit on chip.
using Scratch = std::function<float*(std::int64_t floats)>;

cudaError_t adain_forward(const std::string& dtype, Images images, const AdainForward& arguments,
                          const Scratch& scratch, cudaStream_t stream);
cudaError_t adain_statistics(const std::string& dtype, Images images, const AdainStatistics& arguments,
                             const Scratch& scratch, cudaStream_t stream);
cudaError_t adain_backward(const std::string& dtype, Images images, const AdainBackward& arguments,
                           const Scratch& scratch, cudaStream_t stream);
cudaError_t adain_double_backward(const std::string& dtype, Images images, const AdainDoubleBackward& arguments,
                                  const Scratch& scratch, cudaStream_t stream);

// Standard normal numbers (images, pixels) from a seed on the GPU: gdl_kernels/ops/style_epilogue/reference.py has the
// formula.
cudaError_t draw_noise(const std::int64_t* seed, std::int64_t images, std::int64_t pixels, float* out,
                       cudaStream_t stream);

}  // namespace gdl
