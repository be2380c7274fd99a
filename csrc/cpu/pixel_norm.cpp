#include "pixel_norm.h"

#include <algorithm>
#include <cmath>

#include "elementwise.h"

namespace gdl {
namespace {

using std::int64_t;

// Pixels of a tile at most: what is kept of them stays in L1.
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

// sums[i] += the sum of the terms at i.
template <typename A, typename... Terms>
void add(A* sums, int64_t n, Terms... terms) {
  const A* so_far = sums;
  write(sums, n, [=](auto at) { return at(so_far) + (terms(at) + ...); });
}

// sums[k][i] = the sum over channels of the k-th term(c) at pixel i < n, an expression. In groups of sqrt(C), so that
// rounding errors grow with the root of C, not C.
template <typename A, typename... Terms>
void sum_over_channels(int64_t channels, int64_t n, A (*sums)[kRun], Terms... terms) {
  constexpr int count = sizeof...(Terms);
  alignas(64) A groups[count][kRun];
  const int64_t size = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(channels))));
  for (int k = 0; k < count; ++k) std::fill_n(sums[k], n, A(0));
  for (int64_t c = 0; c < channels;) {
    const int64_t end = std::min(channels, c + size);
    for (auto& group : groups) std::fill_n(group, n, A(0));
    for (; c + 4 <= end; c += 4) {
      int k = 0;
      (add(groups[k++], n, terms(c), terms(c + 1), terms(c + 2), terms(c + 3)), ...);
    }
    for (; c < end; ++c) {
      int k = 0;
      (add(groups[k++], n, terms(c)), ...);
    }
    for (int k = 0; k < count; ++k) {
      const A* group = groups[k];
      add(sums[k], n, [=](auto at) { return at(group); });
    }
  }
}

template <typename T>
void forward_planes(const Images& images, double eps, Lines<const T> x, Lines<T> y, int threads) {
  using A = accumulator_t<T>;
  const A share = A(1) / static_cast<A>(images.channels), epsilon = static_cast<A>(eps);
  for_each_tile(images, tile_pixels<T>(images, 1), threads, [=](int64_t n, int64_t first, int64_t count) {
    alignas(64) A sums[1][kRun];
    const A* r = sums[0];
    sum_over_channels(images.channels, count, sums,
                      [=](int64_t c) { return [in = x.at(n, c) + first](auto at) { return at(in) * at(in); }; });
    write(sums[0], count, [=](auto at) { return A(1) / square_root(at(r) * share + epsilon); });
    for (int64_t c = 0; c < images.channels; ++c) {
      const T* in = x.at(n, c) + first;
      write(y.at(n, c) + first, count, [=](auto at) { return at(in) * at(r); });
    }
  });
}

template <typename T>
void backward_planes(const Images& images, double eps, Lines<const T> grad, Lines<const T> x, Lines<T> dx,
                     int threads) {
  using A = accumulator_t<T>;
  const A share = A(1) / static_cast<A>(images.channels), epsilon = static_cast<A>(eps);
  for_each_tile(images, tile_pixels<T>(images, 2), threads, [=](int64_t n, int64_t first, int64_t count) {
    alignas(64) A sums[2][kRun];
    const A *r = sums[0], *mean = sums[1];
    sum_over_channels(
        images.channels, count, sums,
        [=](int64_t c) { return [in = x.at(n, c) + first](auto at) { return at(in) * at(in); }; },
        [=](int64_t c) {
          return [in = x.at(n, c) + first, g = grad.at(n, c) + first](auto at) { return at(in) * at(g); };
        });
    write(sums[0], count, [=](auto at) { return A(1) / square_root(at(r) * share + epsilon); });
    write(sums[1], count, [=](auto at) { return at(mean) * share * at(r); });  // mean_c(g * r x)
    for (int64_t c = 0; c < images.channels; ++c) {
      const T *in = x.at(n, c) + first, *g = grad.at(n, c) + first;
      write(dx.at(n, c) + first, count, [=](auto at) { return at(r) * (at(g) - at(r) * at(in) * at(mean)); });
    }
  });
}

template <typename T>
void forward_channels_last(const Images& images, double eps, Lines<const T> x, Lines<T> y, int threads) {
  using A = accumulator_t<T>;
  const A share = A(1) / static_cast<A>(images.channels);
  for_each_tile(images, tile_pixels<T>(images, 1), threads, [=](int64_t n, int64_t first, int64_t count) {
    for (int64_t pixel = first; pixel < first + count; ++pixel) {
      const T* in = x.at(n, pixel);
      const auto [square] = sum_up<A>(images.channels, [=](auto at) { return at(in) * at(in); });
      const A r = A(1) / std::sqrt(square * share + static_cast<A>(eps));
      write(y.at(n, pixel), images.channels, [=](auto at) { return at(in) * r; });
    }
  });
}

template <typename T>
void backward_channels_last(const Images& images, double eps, Lines<const T> grad, Lines<const T> x, Lines<T> dx,
                            int threads) {
  using A = accumulator_t<T>;
  const A share = A(1) / static_cast<A>(images.channels);
  for_each_tile(images, tile_pixels<T>(images, 2), threads, [=](int64_t n, int64_t first, int64_t count) {
    for (int64_t pixel = first; pixel < first + count; ++pixel) {
      const T *in = x.at(n, pixel), *g = grad.at(n, pixel);
      const auto [square, product] =
          sum_up<A>(images.channels, [=](auto at) { return at(in) * at(in); }, [=](auto at) { return at(in) * at(g); });
      const A r = A(1) / std::sqrt(square * share + static_cast<A>(eps)), mean = product * share * r;
      write(dx.at(n, pixel), images.channels, [=](auto at) { return r * (at(g) - r * at(in) * mean); });
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
