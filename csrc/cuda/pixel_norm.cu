#include <algorithm>

#include "dtypes.cuh"
#include "pixel_norm.h"

namespace gdl {
namespace {

using std::int64_t;

// Channels that a thread keeps in registers from the sums to the output, so that memory is read once. Those beyond are
// read again, from L2 more often than not.
constexpr int kKept = 8;

constexpr int kThreads = 512;
// A block of planes is at least kThreads / kMaxRows vectors wide: 128 bytes, one line of the cache.
constexpr int kMaxRows = 64;

constexpr int kWarp = 32;

// Adds up values over the threads of a block with the same threadIdx.x; all of them get the sums.
template <int V>
__device__ void sum_over_rows(float (&values)[V]) {
  __shared__ float partial[V][kThreads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int v = 0; v < V; ++v) partial[v][thread] = values[v];
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
#pragma unroll
      for (int v = 0; v < V; ++v) partial[v][thread] += partial[v][thread + half * blockDim.x];
    }
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = partial[v][threadIdx.x];
  __syncthreads();  // the next sum writes where this one is read
}

template <typename T, int V>
__device__ void add_products(const Vector<T, V>& a, const Vector<T, V>& b, float (&sums)[V]) {
  float p[V], q[V];
  widen(a, p);
  widen(b, q);
#pragma unroll
  for (int v = 0; v < V; ++v) sums[v] += p[v] * q[v];
}

// Hides where the words come from. Without it the compiler keeps 16-bit numbers widened to float until they are
// written: twice the registers, more than there are.
template <typename T, int N>
__device__ void stay_packed(Vector<T, 8> (&vectors)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    uint4& words = vectors[k].words;
    asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
  }
}
template <typename T, int V, int N>
__device__ void stay_packed(Vector<T, V> (&)[N]) {}

template <typename T, int V>
__device__ void write_forward(const Vector<T, V>& x, const float (&r)[V], T* out) {
  float y[V];
  widen(x, y);
#pragma unroll
  for (int v = 0; v < V; ++v) y[v] *= r[v];
  store(out, narrow<T>(y));
}

// mean is mean_c(g * r x).
template <typename T, int V>
__device__ void write_backward(const Vector<T, V>& grad, const Vector<T, V>& x, const float (&r)[V],
                               const float (&mean)[V], T* out) {
  float g[V], dx[V];
  widen(grad, g);
  widen(x, dx);
#pragma unroll
  for (int v = 0; v < V; ++v) dx[v] = r[v] * (g[v] - r[v] * dx[v] * mean[v]);
  store(out, narrow<T>(dx));
}

// Planes. A thread has V neighbouring pixels and, of their channels, every blockDim.y-th.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1) forward_planes(Images images, float eps, Lines<const T> x, Lines<T> y) {
  const int64_t vectors = images.pixels / V;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  // Threads past the end have no channels; they stay for the sums.
  const int64_t channels = index < images.count * vectors ? images.channels : 0;
  const int64_t n = index / vectors, pixel = index % vectors * V;

  Vector<T, V> kept[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t c = threadIdx.y + k * blockDim.y;
    kept[k] = c < channels ? load<V>(x.at(n, c) + pixel) : Vector<T, V>{};
  }
  float r[V] = {};
#pragma unroll
  for (int k = 0; k < kKept; ++k) add_products(kept[k], kept[k], r);
  stay_packed(kept);
  const int64_t beyond = threadIdx.y + kKept * blockDim.y;
#pragma unroll 4
  for (int64_t c = beyond; c < channels; c += blockDim.y) {
    const Vector<T, V> in = load<V>(x.at(n, c) + pixel);
    add_products(in, in, r);
  }
  sum_over_rows(r);
#pragma unroll
  for (int v = 0; v < V; ++v) r[v] = rsqrtf(r[v] / images.channels + eps);
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t c = threadIdx.y + k * blockDim.y;
    if (c < channels) write_forward(kept[k], r, y.at(n, c) + pixel);
  }
#pragma unroll 4
  for (int64_t c = beyond; c < channels; c += blockDim.y)
    write_forward(load<V>(x.at(n, c) + pixel), r, y.at(n, c) + pixel);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    backward_planes(Images images, float eps, Lines<const T> grad, Lines<const T> x, Lines<T> dx) {
  const int64_t vectors = images.pixels / V;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t channels = index < images.count * vectors ? images.channels : 0;
  const int64_t n = index / vectors, pixel = index % vectors * V;

  Vector<T, V> kept[kKept], kept_grad[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t c = threadIdx.y + k * blockDim.y;
    kept[k] = c < channels ? load<V>(x.at(n, c) + pixel) : Vector<T, V>{};
    kept_grad[k] = c < channels ? load<V>(grad.at(n, c) + pixel) : Vector<T, V>{};
  }
  float r[V] = {}, mean[V] = {};
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    add_products(kept[k], kept[k], r);
    add_products(kept[k], kept_grad[k], mean);
  }
  stay_packed(kept);
  stay_packed(kept_grad);
  const int64_t beyond = threadIdx.y + kKept * blockDim.y;
#pragma unroll 2
  for (int64_t c = beyond; c < channels; c += blockDim.y) {
    const Vector<T, V> in = load<V>(x.at(n, c) + pixel);
    add_products(in, in, r);
    add_products(in, load<V>(grad.at(n, c) + pixel), mean);
  }
  sum_over_rows(r);
  sum_over_rows(mean);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    r[v] = rsqrtf(r[v] / images.channels + eps);
    mean[v] = mean[v] / images.channels * r[v];
  }
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t c = threadIdx.y + k * blockDim.y;
    if (c < channels) write_backward(kept_grad[k], kept[k], r, mean, dx.at(n, c) + pixel);
  }
#pragma unroll 2
  for (int64_t c = beyond; c < channels; c += blockDim.y)
    write_backward(load<V>(grad.at(n, c) + pixel), load<V>(x.at(n, c) + pixel), r, mean, dx.at(n, c) + pixel);
}

// Adds up a value over `lanes` neighbouring lanes, a power of two; all of them get the sum.
__device__ float sum_over_lanes(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <int V>
__device__ float sum_of(const float (&values)[V]) {
  float sum = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) sum += values[v];
  return sum;
}

template <int V>
__device__ void fill(float (&values)[V], float value) {
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = value;
}

// Channels last. `lanes` neighbouring lanes share a pixel; a lane has every lanes-th vector of V channels.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    forward_channels_last(Images images, float eps, Lines<const T> x, Lines<T> y, int lanes) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  const int64_t channels = index < images.count * images.pixels ? images.channels : 0;
  const T* in = x.at(index / images.pixels, index % images.pixels);
  T* out = y.at(index / images.pixels, index % images.pixels);
  const int first = threadIdx.x % lanes * V, step = lanes * V;

  Vector<T, V> kept[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k)
    kept[k] = first + k * step < channels ? load<V>(in + first + k * step) : Vector<T, V>{};
  float r[V] = {};
#pragma unroll
  for (int k = 0; k < kKept; ++k) add_products(kept[k], kept[k], r);
  stay_packed(kept);
  const int64_t beyond = first + kKept * step;
#pragma unroll 4
  for (int64_t c = beyond; c < channels; c += step) {
    const Vector<T, V> vector = load<V>(in + c);
    add_products(vector, vector, r);
  }
  fill(r, rsqrtf(sum_over_lanes(sum_of(r), lanes) / images.channels + eps));
#pragma unroll
  for (int k = 0; k < kKept; ++k)
    if (first + k * step < channels) write_forward(kept[k], r, out + first + k * step);
#pragma unroll 4
  for (int64_t c = beyond; c < channels; c += step) write_forward(load<V>(in + c), r, out + c);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    backward_channels_last(Images images, float eps, Lines<const T> grad, Lines<const T> x, Lines<T> dx, int lanes) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  const int64_t channels = index < images.count * images.pixels ? images.channels : 0;
  const int64_t n = index / images.pixels, pixel = index % images.pixels;
  const T* in = x.at(n, pixel);
  const T* in_grad = grad.at(n, pixel);
  T* out = dx.at(n, pixel);
  const int first = threadIdx.x % lanes * V, step = lanes * V;

  Vector<T, V> kept[kKept], kept_grad[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    kept[k] = first + k * step < channels ? load<V>(in + first + k * step) : Vector<T, V>{};
    kept_grad[k] = first + k * step < channels ? load<V>(in_grad + first + k * step) : Vector<T, V>{};
  }
  float r[V] = {}, mean[V] = {};
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    add_products(kept[k], kept[k], r);
    add_products(kept[k], kept_grad[k], mean);
  }
  stay_packed(kept);
  stay_packed(kept_grad);
  const int64_t beyond = first + kKept * step;
#pragma unroll 2
  for (int64_t c = beyond; c < channels; c += step) {
    const Vector<T, V> vector = load<V>(in + c);
    add_products(vector, vector, r);
    add_products(vector, load<V>(in_grad + c), mean);
  }
  const float scale = rsqrtf(sum_over_lanes(sum_of(r), lanes) / images.channels + eps);
  fill(mean, sum_over_lanes(sum_of(mean), lanes) / images.channels * scale);
  fill(r, scale);
#pragma unroll
  for (int k = 0; k < kKept; ++k)
    if (first + k * step < channels) write_backward(kept_grad[k], kept[k], r, mean, out + first + k * step);
#pragma unroll 2
  for (int64_t c = beyond; c < channels; c += step)
    write_backward(load<V>(in_grad + c), load<V>(in + c), r, mean, out + c);
}

int power_of_two_at_least(int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

struct Launch {
  dim3 grid, block;
  int lanes;
};

template <int V>
Launch plan(const Images& images) {
  if (images.channels_last) {
    const int lanes = power_of_two_at_least((images.channels + V - 1) / V, kWarp);
    const int64_t threads = images.count * images.pixels * lanes;
    return {dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads)), dim3(kThreads), lanes};
  }
  const int rows = power_of_two_at_least((images.channels + kKept - 1) / kKept, kMaxRows);
  const int columns = kThreads / rows;
  const int64_t vectors = images.count * (images.pixels / V);
  return {dim3(static_cast<unsigned>((vectors + columns - 1) / columns)), dim3(columns, rows), 1};
}

template <typename T>
bool aligned(const Images& images, std::initializer_list<Lines<const void>> tensors) {
  constexpr int V = kVector<T>;
  if ((images.channels_last ? images.channels : images.pixels) % V != 0) return false;
  return std::all_of(tensors.begin(), tensors.end(), [](const Lines<const void>& t) {
    return reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 && t.image % V == 0 && t.line % V == 0;
  });
}

template <typename T>
Lines<const T> typed(Lines<const void> lines) {
  return {static_cast<const T*>(lines.data), lines.image, lines.line};
}

template <typename T>
Lines<T> typed(Lines<void> lines) {
  return {static_cast<T*>(lines.data), lines.image, lines.line};
}

Lines<const void> read_only(Lines<void> lines) { return {lines.data, lines.image, lines.line}; }

template <typename T, int V>
cudaError_t launch_forward(Images images, float eps, Lines<const T> x, Lines<T> y, cudaStream_t stream) {
  const Launch launch = plan<V>(images);
  if (images.channels_last)
    forward_channels_last<T, V><<<launch.grid, launch.block, 0, stream>>>(images, eps, x, y, launch.lanes);
  else
    forward_planes<T, V><<<launch.grid, launch.block, 0, stream>>>(images, eps, x, y);
  return cudaGetLastError();
}

template <typename T, int V>
cudaError_t launch_backward(Images images, float eps, Lines<const T> grad, Lines<const T> x, Lines<T> dx,
                            cudaStream_t stream) {
  const Launch launch = plan<V>(images);
  if (images.channels_last)
    backward_channels_last<T, V><<<launch.grid, launch.block, 0, stream>>>(images, eps, grad, x, dx, launch.lanes);
  else
    backward_planes<T, V><<<launch.grid, launch.block, 0, stream>>>(images, eps, grad, x, dx);
  return cudaGetLastError();
}

}  // namespace

cudaError_t pixel_norm_forward(const std::string& dtype, Images images, float eps, Lines<const void> x, Lines<void> y,
                               cudaStream_t stream) {
  if (images.count * images.channels * images.pixels == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return (aligned<T>(images, {x, read_only(y)})
                ? launch_forward<T, kVector<T>>
                : launch_forward<T, 1>)(images, eps, typed<T>(x), typed<T>(y), stream);
  });
}

cudaError_t pixel_norm_backward(const std::string& dtype, Images images, float eps, Lines<const void> grad,
                                Lines<const void> x, Lines<void> dx, cudaStream_t stream) {
  if (images.count * images.channels * images.pixels == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return (aligned<T>(images, {grad, x, read_only(dx)})
                ? launch_backward<T, kVector<T>>
                : launch_backward<T, 1>)(images, eps, typed<T>(grad), typed<T>(x), typed<T>(dx), stream);
  });
}

}  // namespace gdl
