// The gradient of noise from that of x: a sum over channels, each with a weight, and over images where one noise serves
// them all.
#include <cuda_runtime.h>

#include "adain.h"
#include "dtypes.cuh"

namespace gdl {
namespace {

using std::int64_t;

constexpr int kWarp = 32, kRows = 8;

struct Sums {
  Images images;
  Lines<const float> gradient;
  Numbers<const void> weight;
  Numbers<void> out;
  int64_t count;  // images of the noise: all, or one

  __device__ float weight_of(int64_t channel) const {
    float value;
    with_type(weight.type, [&](auto type) {
      using T = typename decltype(type)::type;
      value = to_float(static_cast<const T*>(weight.data)[channel]);
    });
    return value;
  }

  __device__ void write(int64_t pixel, float value) const {
    with_type(out.type, [&](auto type) {
      using T = typename decltype(type)::type;
      static_cast<T*>(out.data)[pixel] = from_float<T>(value);
    });
  }
};

// Planes. A thread has V neighbouring pixels and, of their channels, every kRows-th.
template <int V>
__global__ void __launch_bounds__(kWarp* kRows, 4) over_planes(const __grid_constant__ Sums sums) {
  __shared__ float partial[V][kRows][kWarp];
  const int64_t vectors = sums.images.pixels / V;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const bool exists = index < sums.count * vectors;
  const int64_t pixel = index % vectors * V;

  float total[V] = {};
  if (exists) {
    for (int64_t n = index / vectors; n < sums.images.count; n += sums.count) {
#pragma unroll 4
      for (int64_t c = threadIdx.y; c < sums.images.channels; c += kRows) {
        const float weight = sums.weight_of(c);
        float gradient[V];
        widen(load<V>(sums.gradient.at(n, c) + pixel), gradient);
#pragma unroll
        for (int v = 0; v < V; ++v) total[v] += weight * gradient[v];
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) partial[v][threadIdx.y][threadIdx.x] = total[v];
  __syncthreads();
  if (threadIdx.y != 0 || !exists) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float sum = 0;
#pragma unroll
    for (int row = 0; row < kRows; ++row) sum += partial[v][row][threadIdx.x];
    sums.write(index * V + v, sum);
  }
}

// Channels last: a warp to a pixel.
__global__ void __launch_bounds__(kWarp* kRows, 4) over_channels(const __grid_constant__ Sums sums) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.y;
  if (index >= sums.count * sums.images.pixels) return;
  float total = 0;
  for (int64_t n = index / sums.images.pixels; n < sums.images.count; n += sums.count) {
    const float* gradient = sums.gradient.at(n, index % sums.images.pixels);
#pragma unroll 4
    for (int64_t c = threadIdx.x; c < sums.images.channels; c += kWarp) total += sums.weight_of(c) * gradient[c];
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
  if (threadIdx.x == 0) sums.write(index, total);
}

}  // namespace

cudaError_t adain_noise_gradient(Images images, Lines<const float> gradient, Numbers<const void> weight,
                                 Numbers<void> out, bool one_for_all, cudaStream_t stream) {
  const Sums sums{images, gradient, weight, out, one_for_all ? 1 : images.count};
  if (sums.count * images.pixels == 0) return cudaSuccess;
  const bool vectors = images.pixels % 4 == 0 && reinterpret_cast<std::uintptr_t>(gradient.data) % 16 == 0 &&
                       gradient.image % 4 == 0 && gradient.line % 4 == 0;
  const int64_t warps = sums.count * images.pixels;
  const int64_t blocks =
      images.channels_last ? (warps + kRows - 1) / kRows : (warps / (vectors ? 4 : 1) + kWarp - 1) / kWarp;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kWarp, kRows);
  config.stream = stream;
  return cudaLaunchKernelEx(&config,
                            images.channels_last ? over_channels
                            : vectors            ? over_planes<4>
                                                 : over_planes<1>,
                            sums);
}

}  // namespace gdl
