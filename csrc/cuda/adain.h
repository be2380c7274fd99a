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
#include "numbers.h"

namespace gdl {

// What happens to x before its statistics are taken.
struct Prologue {
  bool active = false;         // false: h = x
  Numbers<const void> noise;   // (N or 1, pixels), or null
  std::int64_t image = 0;      // from image to image of the noise: 0 where one serves all
  Numbers<const void> weight;  // (C); null without noise
  Numbers<const void> bias;    // (C), or null
  float slope = 1;
};

// Of every plane: (N, C).
struct Modulation {
  Numbers<const void> scale;
  const float *mean, *rstd;
};

// Of scale and shift (N, C), of weight and bias (C). Null are those that are not wanted.
struct Gradients {
  Numbers<void> scale, shift, weight, bias;
};

// Likewise. Null are those that are zero.
struct Directions {
  Numbers<const void> scale, shift, weight, bias;
};

struct AdainForward {
  Lines<const void> x;
  Numbers<const void> scale, shift;
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
  Gradients gradients;
};

// Of <v, dx> + <v_scale, dscale> + <v_shift, dshift> + <v_weight, dweight> + <v_bias, dbias>. The gradient of shift is
// zero, and not written.
struct AdainDoubleBackward {
  Lines<const void> v;
  Directions directions;
  Lines<const void> grad, x;
  Modulation modulation;
  Prologue prologue;
  Lines<void> grad_grad, grad_x;
  Gradients gradients;
};

// Memory on the GPU for so many floats, at least until the kernels that were launched have run. Asked for once at most:
// where planes do not fit on chip, and for gradients of weight and bias.
using Scratch = std::function<float*(std::int64_t floats)>;

cudaError_t adain_forward(const std::string& dtype, Images images, const AdainForward& arguments,
                          const Scratch& scratch, cudaStream_t stream);
cudaError_t adain_statistics(const std::string& dtype, Images images, const AdainStatistics& arguments,
                             const Scratch& scratch, cudaStream_t stream);
cudaError_t adain_backward(const std::string& dtype, Images images, const AdainBackward& arguments,
                           const Scratch& scratch, cudaStream_t stream);
cudaError_t adain_double_backward(const std::string& dtype, Images images, const AdainDoubleBackward& arguments,
                                  const Scratch& scratch, cudaStream_t stream);

// out: (N or 1, pixels), the sum over channels of weight[c] * gradient, and over images where the noise is one for all.
cudaError_t adain_noise_gradient(Images images, Lines<const float> gradient, Numbers<const void> weight,
                                 Numbers<void> out, bool one_for_all, cudaStream_t stream);

// A seed, or where it is on the GPU its address: what is drawn when a graph is replayed is not known when it is made.
struct Seed {
  const std::int64_t* address;
  std::int64_t value;
};

// Standard normal numbers (images, pixels): gdl_kernels/ops/style_epilogue/reference.py has the formula.
cudaError_t draw_noise(Seed seed, std::int64_t images, std::int64_t pixels, float* out, cudaStream_t stream);

}  // namespace gdl
