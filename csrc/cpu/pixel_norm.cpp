#include "pixel_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "half.h"

namespace gdl {
namespace {

using std::int64_t;

// Numbers a thread widens at a time: its buffers stay in L1.
constexpr int64_t kRun = 1024;

// Bytes of a tile that is read twice, for the sums and then to scale: it should still be in L2 the second time.
constexpr int64_t kTile = 256 * 1024;

// How many neighbouring pixels make a tile.
template <typename T>
int64_t tile_pixels(const Images& images, int tensors) {
  const int64_t bytes = std::max<int64_t>(1, images.channels * tensors * static_cast<int64_t>(sizeof(T)));
  // A whole number of cache lines for every dtype, so that threads do not share the lines they write.
  return std::clamp<int64_t>(kTile / bytes / 64 * 64, 64, kRun);
}

// f(n, first pixel, number of pixels) for every tile.
template <typename F>
void for_each_tile(const Images& images, int64_t size, int threads, F f) {
  const int64_t tiles = (images.pixels + size - 1) / size;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < images.count * tiles; ++tile) {
    const int64_t first = tile % tiles * size;
    f(tile / tiles, first, std::min(size, images.pixels - first));
  }
}

// n numbers to compute with: themselves, or widened into a buffer.
template <typename T>
const accumulator_t<T>* widened(const T* in, accumulator_t<T>* buffer, int64_t n) {
  if constexpr (std::is_same_v<T, accumulator_t<T>>) {
    return in;
  } else {
    load(in, buffer, n);
    return buffer;
  }
}

// Writes value(i) for i < n, rounded to T.
template <typename T, typename Value>
void write(T* out, accumulator_t<T>* buffer, int64_t n, Value value) {
  if constexpr (std::is_same_v<T, accumulator_t<T>>) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = value(i);
  } else {
    // value may read buffer[i] itself: that is no dependence between iterations.
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) buffer[i] = value(i);
    store(buffer, out, n);
  }
}

// sums[i] = the sum over c of term(c)[i]. In groups of sqrt(C), so that rounding errors grow with the root of C, not
// C.
template <typename A, typename Term>
void sum_over_channels(int64_t channels, int64_t n, A* __restrict sums, A* __restrict group, Term add_term) {
  const int64_t size = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(channels))));
  std::fill_n(sums, n, A(0));
  for (int64_t c = 0; c < channels;) {
    std::fill_n(group, n, A(0));
    for (const int64_t end = std::min(channels, c + size); c < end; ++c) add_term(c, group);
    for (int64_t i = 0; i < n; ++i) sums[i] += group[i];
  }
}

template <typename A>
void add_products(const A* __restrict a, const A* __restrict b, A* __restrict sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += a[i] * b[i];
}

// The sum of a[i] * b[i], in as many partial sums as a 64-byte register holds.
template <typename A>
A dot(const A* a, const A* b, int64_t n) {
  typedef A Pack __attribute__((vector_size(64)));
  constexpr int64_t width = sizeof(Pack) / sizeof(A);
  Pack packs = {};
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    Pack p, q;
    std::memcpy(&p, a + i, sizeof p);
    std::memcpy(&q, b + i, sizeof q);
    packs += p * q;
  }
  A rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) packs[k] += packs[k + half];
  return packs[0] + rest;
}

template <typename T>
void forward_planes(const Images& images, double eps, Lines<const T> x, Lines<T> y, int threads) {
  using A = accumulator_t<T>;
  const A share = A(1) / static_cast<A>(images.channels);
  for_each_tile(images, tile_pixels<T>(images, 1), threads, [=](int64_t n, int64_t first, int64_t count) {
    alignas(64) A scale[kRun], group[kRun], row[kRun];
    sum_over_channels(images.channels, count, scale, group, [&](int64_t c, A* sums) {
      const A* in = widened(x.at(n, c) + first, row, count);
      add_products(in, in, sums, count);
    });
    for (int64_t i = 0; i < count; ++i) scale[i] = A(1) / std::sqrt(scale[i] * share + static_cast<A>(eps));
    for (int64_t c = 0; c < images.channels; ++c) {
      const A* in = widened(x.at(n, c) + first, row, count);
      write(y.at(n, c) + first, row, count, [&](int64_t i) { return in[i] * scale[i]; });
    }
  });
}

template <typename T>
void backward_planes(const Images& images, double eps, Lines<const T> grad, Lines<const T> x, Lines<T> dx,
                     int threads) {
  using A = accumulator_t<T>;
  const A share = A(1) / static_cast<A>(images.channels);
  for_each_tile(images, tile_pixels<T>(images, 2), threads, [=](int64_t n, int64_t first, int64_t count) {
    alignas(64) A scale[kRun], mean[kRun], group[kRun], row[kRun], grad_row[kRun];
    sum_over_channels(images.channels, count, scale, group, [&](int64_t c, A* sums) {
      const A* in = widened(x.at(n, c) + first, row, count);
      add_products(in, in, sums, count);
    });
    sum_over_channels(images.channels, count, mean, group, [&](int64_t c, A* sums) {
      const A* in = widened(x.at(n, c) + first, row, count);
      add_products(in, widened(grad.at(n, c) + first, grad_row, count), sums, count);
    });
    for (int64_t i = 0; i < count; ++i) {
      scale[i] = A(1) / std::sqrt(scale[i] * share + static_cast<A>(eps));
      mean[i] *= share * scale[i];  // mean_c(g * r x)
    }
    for (int64_t c = 0; c < images.channels; ++c) {
      const A* in = widened(x.at(n, c) + first, row, count);
      const A* g = widened(grad.at(n, c) + first, grad_row, count);
      write(dx.at(n, c) + first, row, count, [&](int64_t i) { return scale[i] * (g[i] - scale[i] * in[i] * mean[i]); });
    }
  });
}

// The sum over channels of a[c] * b[c] for one pixel.
template <typename T>
accumulator_t<T> pixel_dot(const T* a, const T* b, int64_t channels, accumulator_t<T>* a_row, accumulator_t<T>* b_row) {
  accumulator_t<T> sum = 0;
  for (int64_t c = 0; c < channels; c += kRun) {
    const int64_t count = std::min(kRun, channels - c);
    const auto* p = widened(a + c, a_row, count);
    const auto* q = a == b ? p : widened(b + c, b_row, count);
    sum += dot(p, q, count);
  }
  return sum;
}

template <typename T>
void forward_channels_last(const Images& images, double eps, Lines<const T> x, Lines<T> y, int threads) {
  using A = accumulator_t<T>;
  const A share = A(1) / static_cast<A>(images.channels);
  for_each_tile(images, tile_pixels<T>(images, 1), threads, [=](int64_t n, int64_t first, int64_t count) {
    alignas(64) A row[kRun];
    for (int64_t pixel = first; pixel < first + count; ++pixel) {
      const T* in = x.at(n, pixel);
      const A scale = A(1) / std::sqrt(pixel_dot(in, in, images.channels, row, row) * share + static_cast<A>(eps));
      for (int64_t c = 0; c < images.channels; c += kRun) {
        const int64_t width = std::min(kRun, images.channels - c);
        const A* values = widened(in + c, row, width);
        write(y.at(n, pixel) + c, row, width, [&](int64_t i) { return values[i] * scale; });
      }
    }
  });
}

template <typename T>
void backward_channels_last(const Images& images, double eps, Lines<const T> grad, Lines<const T> x, Lines<T> dx,
                            int threads) {
  using A = accumulator_t<T>;
  const A share = A(1) / static_cast<A>(images.channels);
  for_each_tile(images, tile_pixels<T>(images, 2), threads, [=](int64_t n, int64_t first, int64_t count) {
    alignas(64) A row[kRun], grad_row[kRun];
    for (int64_t pixel = first; pixel < first + count; ++pixel) {
      const T* in = x.at(n, pixel);
      const T* in_grad = grad.at(n, pixel);
      const A square = pixel_dot(in, in, images.channels, row, row) * share;
      const A scale = A(1) / std::sqrt(square + static_cast<A>(eps));
      const A mean = pixel_dot(in, in_grad, images.channels, row, grad_row) * share * scale;  // mean_c(g * r x)
      for (int64_t c = 0; c < images.channels; c += kRun) {
        const int64_t width = std::min(kRun, images.channels - c);
        const A* values = widened(in + c, row, width);
        const A* g = widened(in_grad + c, grad_row, width);
        write(dx.at(n, pixel) + c, row, width, [&](int64_t i) { return scale * (g[i] - scale * values[i] * mean); });
      }
    }
  });
}

}  // namespace

template <typename T>
void pixel_norm_forward(Images images, double eps, Lines<const T> x, Lines<T> y, int threads) {
  (images.channels_last ? forward_channels_last<T> : forward_planes<T>)(images, eps, x, y, threads);
}

template <typename T>
void pixel_norm_backward(Images images, double eps, Lines<const T> grad, Lines<const T> x, Lines<T> dx, int threads) {
  (images.channels_last ? backward_channels_last<T> : backward_planes<T>)(images, eps, grad, x, dx, threads);
}

#define GDL_INSTANTIATE(T)                                                            \
  template void pixel_norm_forward<T>(Images, double, Lines<const T>, Lines<T>, int); \
  template void pixel_norm_backward<T>(Images, double, Lines<const T>, Lines<const T>, Lines<T>, int);
GDL_INSTANTIATE(float)
GDL_INSTANTIATE(double)
GDL_INSTANTIATE(float16)
GDL_INSTANTIATE(bfloat16)
#undef GDL_INSTANTIATE

}  // namespace gdl
