// Adaptive instance normalisation on the CPU, of x or of what StyleGAN's epilogue makes of it first:
//
//   u = x + weight[c] * noise[n, pixel] + bias[c],  h = u > 0 ? u : slope * u
//   y = scale * (h - mean) * rstd + shift,  mean and rstd = 1 / sqrt(variance + eps) of h over a plane
//
// and two gradients of it. docs/adain.md derives the formulas. T is what sums are kept in: float, for double double.
#pragma once

#include "../images.h"
#include "half.h"

namespace gdl {

// What happens to x before its statistics are taken.
template <typename T>
struct Prologue {
  bool active;         // false: h = x
  const T* noise;      // (N or 1, pixels), or null
  std::int64_t image;  // from image to image of the noise: 0 where one serves all
  const T* weight;     // (C), or null
  const T* bias;       // (C), or null
  T slope;
};

// Of every plane: (N, C).
template <typename T>
struct Modulation {
  const T *scale, *mean, *rstd;
};

template <typename E, typename T = accumulator_t<E>>
void adain_forward(Images images, const Prologue<T>& prologue, double eps, Lines<const E> x, const T* scale,
                   const T* shift, Lines<E> y, T* mean, T* rstd, int threads);

// deviation = sqrt(variance + eps)
template <typename E, typename T = accumulator_t<E>>
void adain_statistics(Images images, double eps, Lines<const E> x, T* mean, T* deviation, int threads);

// What one plane adds to the gradients of scale, shift, weight and bias.
template <typename T>
struct PlaneGradients {
  T *scale, *shift, *weight, *bias;
};

template <typename E, typename T = accumulator_t<E>>
void adain_backward(Images images, const Prologue<T>& prologue, Lines<const E> grad, Lines<const E> x,
                    const Modulation<T>& modulation, Lines<E> dx, const PlaneGradients<T>& gradients, int threads);

// Of <v, dx> + sum over planes of v_scale dscale + v_shift dshift + v_weight dweight + v_bias dbias.
template <typename T>
struct PlaneDirections {
  const T *scale, *shift, *weight, *bias;
};

template <typename E, typename T = accumulator_t<E>>
void adain_double_backward(Images images, const Prologue<T>& prologue, Lines<const E> v,
                           const PlaneDirections<T>& directions, Lines<const E> grad, Lines<const E> x,
                           const Modulation<T>& modulation, Lines<E> grad_grad, Lines<E> grad_x,
                           const PlaneGradients<T>& gradients, int threads);

// Standard normal numbers (images, pixels) from a seed: gdl_kernels/ops/style_epilogue/reference.py has the formula.
template <typename T>
void draw_noise(std::uint64_t seed, std::int64_t images, std::int64_t pixels, T* out, int threads);

}  // namespace gdl
