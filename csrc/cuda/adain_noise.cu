// Standard normal noise from a counter, by the transform of Box and Muller.
//
// Counter (q, image) gives four normal numbers, those of the pixels q, Q + q, 2 Q + q and 3 Q + q, where Q is a quarter
// of the pixels, rounded up: so neighbouring threads write neighbouring numbers.
#include "adain.h"
#include "philox.cuh"

namespace gdl {
namespace {

using std::int64_t;

constexpr unsigned kStream = 0x6e6f6973;
constexpr int kThreads = 256;

__device__ float2 normal_pair(unsigned a, unsigned b) {
  const float radius = sqrtf(-2 * logf(((a >> 9) + 0.5f) * 0x1p-23f));
  float sine, cosine;
  sincospif((b >> 9) * 0x1p-22f, &sine, &cosine);
  return make_float2(radius * cosine, radius * sine);
}

__global__ void __launch_bounds__(kThreads) draw(Seed seed, int64_t images, int64_t pixels, float* out) {
  const int64_t quarter = (pixels + 3) / 4;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= images * quarter) return;
  const int64_t n = index / quarter, q = index % quarter;
  const int64_t key = seed.address == nullptr ? seed.value : *seed.address;
  const uint4 words = philox(static_cast<std::uint64_t>(key),
                             make_uint4(static_cast<unsigned>(q), static_cast<unsigned>(n), 0, kStream));
  const float2 low = normal_pair(words.x, words.y), high = normal_pair(words.z, words.w);
  const float normals[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (k * quarter + q < pixels) out[n * pixels + k * quarter + q] = normals[k];
}

}  // namespace

cudaError_t draw_noise(Seed seed, int64_t images, int64_t pixels, float* out, cudaStream_t stream) {
  const int64_t counters = images * ((pixels + 3) / 4);
  if (counters == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((counters + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, draw, seed, images, pixels, out);
}

}  // namespace gdl
