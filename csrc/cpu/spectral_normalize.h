// Spectral normalisation of many matrices at once on the CPU, and its gradient.
#pragma once

#include <cstdint>
#include <vector>

#include "half.h"

namespace gdl {

// A matrix (rows, outer * inner) as it lies in memory, dense: [outer][rows][inner]. Its columns, and v with them, are
// counted as they lie there. outer is 1 but for transposed weights.
struct SpectralShape {
  std::int64_t outer, rows, inner;

  std::int64_t columns() const { return outer * inner; }
};

template <typename T>
struct SpectralMatrix {
  SpectralShape shape;
  const T* weight;
  T* out;  // as weight lies
  const accumulator_t<T>* u;
  const accumulator_t<T>* v;
  accumulator_t<T>* new_u;
  accumulator_t<T>* new_v;
};

template <typename T>
struct SpectralGradient {
  SpectralShape shape;
  const T* grad;  // as weight lies
  const T* weight;
  T* grad_weight;
  const accumulator_t<T>* u;
  const accumulator_t<T>* v;
};

// out = W / sigma with sigma = u' W v, after `iterations` times u = W v / max(|W v|, eps), then v likewise of W' u;
// with v_first v, then u. new_u, new_v: the last of them, or u and v again where there are no iterations. T: float,
// double, float16 or bfloat16. The same bits for any number of threads.
template <typename T>
void spectral_normalize_forward(const std::vector<SpectralMatrix<T>>& matrices, int iterations, bool v_first,
                                double eps, accumulator_t<T>* sigmas, int threads);

// grad_weight = (G - <G, W / sigma> u v') / sigma
template <typename T>
void spectral_normalize_backward(const std::vector<SpectralGradient<T>>& matrices, const accumulator_t<T>* sigmas,
                                 int threads);

}  // namespace gdl
