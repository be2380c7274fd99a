#include "conditional_batch_norm_passes.h"

#include <algorithm>

#include "buffer.h"
#include "elementwise.h"

namespace gdl {
namespace {

using std::int64_t;

// Elements of a tile: moments read it twice, the second time from L1.
constexpr int64_t kTile = 4096;

// Elements whose sum is kept in the dtype that they are widened to; such sums are added in double.
constexpr int64_t kPiece = 512;

// With channels last, the rows of a tile, and the channels whose sums are kept in L1 while its rows are walked.
constexpr int64_t kRows = 64;
constexpr int64_t kStrip = 256;

// How images are cut into tiles. Planar: a run of a plane's pixels, or several small planes in one task. Channels last:
// rows. A tile has the same place in memory whatever the number of threads.
struct Tiles {
  explicit Tiles(const Images& images)
      : images(images),
        pixels(images.channels_last ? kRows : kTile),
        per_image((images.pixels + pixels - 1) / pixels),
        channels(images.channels_last ? images.channels : std::max<int64_t>(1, kTile / images.pixels)),
        blocks((images.channels + channels - 1) / channels) {}

  int64_t tasks() const { return images.count * blocks * per_image; }
  int64_t size(int64_t tile) const { return std::min(pixels, images.pixels - tile * pixels); }
  int64_t parts() const { return images.count * per_image; }

  Images images;
  int64_t pixels;     // of a tile
  int64_t per_image;  // tiles of a plane
  int64_t channels;   // of a task
  int64_t blocks;     // of channels
};

struct Task {
  int64_t n, tile, first_channel, end_channel;
};

// f(task). In the other direction, a pass begins where the one before has ended, with what is still in the caches.
template <typename F>
void for_each_task(const Tiles& tiles, int threads, bool backwards, F f) {
  const int64_t count = tiles.tasks();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t task = backwards ? count - 1 - i : i;
    const int64_t block = task / tiles.per_image % tiles.blocks, first = block * tiles.channels;
    f(Task{task / tiles.per_image / tiles.blocks, task % tiles.per_image, first,
           std::min(first + tiles.channels, tiles.images.channels)});
  }
}

// sums[c] += the sum of term(row)(at c) over rows. Four rows at a time: one sum is loaded and stored for four terms.
template <typename A, typename Term>
void add_rows(A* sums, int64_t channels, int64_t rows, Term term) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    const auto a = term(row), b = term(row + 1), c = term(row + 2), d = term(row + 3);
    write(sums, channels, [=](auto at) { return at(sums) + ((a(at) + b(at)) + (c(at) + d(at))); });
  }
  for (; row < rows; ++row) {
    const auto a = term(row);
    write(sums, channels, [=](auto at) { return at(sums) + a(at); });
  }
}

// The moments of `size` numbers, from their sum, and the sum and sum of squares of what they differ from `around`,
// which is their mean but for rounding.
template <typename A>
void put_moments(A around, A rest, A squares, int64_t size, double* mean, double* out) {
  const double part = static_cast<double>(rest) / static_cast<double>(size);
  *mean = static_cast<double>(around) + part;
  *out = std::max(static_cast<double>(squares) - static_cast<double>(rest) * part, 0.0);  // NaN stays NaN
}

template <typename T>
void plane_moments(const T* x, int64_t size, double* mean, double* squares) {
  using A = accumulator_t<T>;
  const A around = sum_up<A>(size, [=](auto at) { return at(x); })[0] / static_cast<A>(size);
  const auto differs = [=](auto at) { return at(x) - around; };
  const auto [rest, square] = sum_up<A>(size, differs, [=](auto at) { return differs(at) * differs(at); });
  put_moments<A>(around, rest, square, size, mean, squares);
}

template <typename T>
void row_moments(Lines<const T> x, int64_t n, int64_t first_row, int64_t rows, int64_t channels, double* mean,
                 double* squares) {
  using A = accumulator_t<T>;
  alignas(64) A around[kStrip], rest[kStrip], square[kStrip];
  for (int64_t c = 0; c < channels; c += kStrip) {
    const int64_t width = std::min(kStrip, channels - c);
    const auto line = [&](int64_t row) { return x.at(n, first_row + row) + c; };
    std::fill_n(around, width, A(0));
    std::fill_n(rest, width, A(0));
    std::fill_n(square, width, A(0));
    add_rows(around, width, rows, [&](int64_t row) { return [p = line(row)](auto at) { return at(p); }; });
    for (int64_t i = 0; i < width; ++i) around[i] /= static_cast<A>(rows);
    const A* middle = around;
    add_rows(rest, width, rows,
             [&](int64_t row) { return [=, p = line(row)](auto at) { return at(p) - at(middle); }; });
    add_rows(square, width, rows, [&](int64_t row) {
      return [=, p = line(row)](auto at) {
        const auto d = at(p) - at(middle);
        return d * d;
      };
    });
    for (int64_t i = 0; i < width; ++i)
      put_moments<A>(around[i], rest[i], square[i], rows, mean + c + i, squares + c + i);
  }
}

// Chan's formula for all tiles of a channel at once: with the mean of all, each tile adds its own squares and, as often
// as it has numbers, the square of how far its mean is off.
void merge(const Tiles& tiles, const double* means, const double* squares, double* mean, double* square, int threads) {
  const int64_t channels = tiles.images.channels, strips = (channels + kStrip - 1) / kStrip;
  const double count = static_cast<double>(tiles.images.count * tiles.images.pixels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t first = strip * kStrip, end = std::min(first + kStrip, channels);
    std::fill(mean + first, mean + end, 0.0);
    std::fill(square + first, square + end, 0.0);
    for (int64_t part = 0; part < tiles.parts(); ++part) {
      const double share = static_cast<double>(tiles.size(part % tiles.per_image)) / count;
      const double* m = means + part * channels;
#pragma GCC ivdep
      for (int64_t c = first; c < end; ++c) mean[c] += share * m[c];
    }
    for (int64_t part = 0; part < tiles.parts(); ++part) {
      const double size = static_cast<double>(tiles.size(part % tiles.per_image));
      const double *m = means + part * channels, *s = squares + part * channels;
#pragma GCC ivdep
      for (int64_t c = first; c < end; ++c) square[c] += s[c] + size * (m[c] - mean[c]) * (m[c] - mean[c]);
    }
  }
}

// Parts of lines.
template <typename T>
struct Pointers {
  const T *v, *grad, *x;
};

// f(the terms of conditional_batch_norm_sums): of pointers, each gives an expression of a place in their lines.
template <bool kSecond, typename T, typename Mean, typename F>
auto with_terms(Mean mean, F f) {
  using P = Pointers<T>;
  const auto grad = [](P p) { return [=](auto at) { return at(p.grad); }; };
  const auto grad_x = [mean](P p) { return [=](auto at) { return at(p.grad) * (at(p.x) - at(mean)); }; };
  if constexpr (kSecond) {
    const auto v = [](P p) { return [=](auto at) { return at(p.v); }; };
    const auto v_x = [mean](P p) { return [=](auto at) { return at(p.v) * (at(p.x) - at(mean)); }; };
    const auto v_grad = [](P p) { return [=](auto at) { return at(p.v) * at(p.grad); }; };
    return f(grad, grad_x, v, v_x, v_grad);
  } else {
    return f(grad, grad_x);
  }
}

template <bool kSecond, typename T>
void sums_of_planes(const Images& images, Lines<const T> v, Lines<const T> grad, Lines<const T> x,
                    const accumulator_t<T>* mean, accumulator_t<T>* sums, int threads) {
  using A = accumulator_t<T>;
  constexpr int count = kSecond ? 5 : 2;
  const Tiles tiles(images);
  // parts (count, N, tiles of an image, C)
  const int64_t step = tiles.parts() * images.channels;
  const bool whole = tiles.per_image == 1;
  const Buffer<A> memory = make_buffer<A>(whole ? 0 : count * step);
  A* parts = whole ? sums : memory.get();
  for_each_task(tiles, threads, false, [=](const Task& task) {
    A* out = parts + (task.n * tiles.per_image + task.tile) * images.channels;
    const int64_t first = task.tile * tiles.pixels, size = tiles.size(task.tile);
    if (!images.channels_last) {
      for (int64_t c = task.first_channel; c < task.end_channel; ++c) {
        const Pointers<T> p{kSecond ? v.at(task.n, c) + first : nullptr, grad.at(task.n, c) + first,
                            x.at(task.n, c) + first};
        std::array<double, count> total = {};
        for (int64_t i = 0; i < size; i += kPiece) {
          const Pointers<T> piece{kSecond ? p.v + i : nullptr, p.grad + i, p.x + i};
          const auto found = with_terms<kSecond, T>(
              mean[c], [=](auto... terms) { return sum_up<A>(std::min(kPiece, size - i), terms(piece)...); });
          for (int k = 0; k < count; ++k) total[k] += static_cast<double>(found[k]);
        }
        for (int k = 0; k < count; ++k) out[k * step + c] = static_cast<A>(total[k]);
      }
      return;
    }
    for (int64_t c = 0; c < images.channels; c += kStrip) {
      const int64_t width = std::min(kStrip, images.channels - c);
      const auto add = [&](int k, auto term) {
        std::fill_n(out + k * step + c, width, A(0));
        add_rows(out + k * step + c, width, size, [&](int64_t row) {
          const Pointers<T> p{kSecond ? v.at(task.n, first + row) + c : nullptr, grad.at(task.n, first + row) + c,
                              x.at(task.n, first + row) + c};
          return term(p);
        });
      };
      int k = 0;
      with_terms<kSecond, T>(mean + c, [&](auto... terms) { (add(k++, terms), ...); });
    }
  });
  if (whole) return;
  const int64_t planes = images.count * images.channels;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < images.count; ++n) {
    for (int k = 0; k < count; ++k) {
      for (int64_t c = 0; c < images.channels; ++c) {
        const A* part = parts + k * step + n * tiles.per_image * images.channels + c;
        double sum = 0;
        for (int64_t tile = 0; tile < tiles.per_image; ++tile) sum += static_cast<double>(part[tile * images.channels]);
        sums[k * planes + n * images.channels + c] = static_cast<A>(sum);
      }
    }
  }
}

// Weights are numbers along a line of pixels, and lines themselves along a line of channels.
template <int kOthers, bool kX, typename T, typename Number>
auto combination(const T* a, const T* b, const T* x, Number a_weight, Number b_weight, Number x_weight, Number mean,
                 Number offset) {
  return [=](auto at) {
    if constexpr (kOthers == 0)
      return at(x_weight) * (at(x) - at(mean)) + at(offset);
    else if constexpr (!kX)
      return at(a_weight) * at(a) + at(offset);
    else if constexpr (kOthers == 1)
      return at(x_weight) * (at(x) - at(mean)) + (at(a_weight) * at(a) + at(offset));
    else
      return at(x_weight) * (at(x) - at(mean)) + (at(a_weight) * at(a) + (at(b_weight) * at(b) + at(offset)));
  };
}

template <int kOthers, bool kX, typename T>
void combine(const Images& images, const Term<T>* others, const Term<T>* given_x, const accumulator_t<T>* mean,
             Planes<accumulator_t<T>> offset, Lines<T> out, int threads) {
  using A = accumulator_t<T>;
  const Tiles tiles(images);
  // Terms that are not there stand for others that are, and are never read.
  const Term<T> a = kOthers > 0 ? others[0] : *given_x, b = kOthers > 1 ? others[1] : a, x = kX ? *given_x : a;
  for_each_task(tiles, threads, true, [=](const Task& task) {
    const int64_t n = task.n, first = task.tile * tiles.pixels, size = tiles.size(task.tile);
    const A *a_weight = a.weight.at(n), *b_weight = b.weight.at(n), *x_weight = x.weight.at(n), *plus = offset.at(n);
    if (!images.channels_last) {
      for (int64_t c = task.first_channel; c < task.end_channel; ++c) {
        write(out.at(n, c) + first, size,
              combination<kOthers, kX, T, A>(a.tensor.at(n, c) + first, b.tensor.at(n, c) + first,
                                             x.tensor.at(n, c) + first, a_weight[c], b_weight[c], x_weight[c], mean[c],
                                             plus[c]));
      }
      return;
    }
    for (int64_t row = first; row < first + size; ++row) {
      write(out.at(n, row), images.channels,
            combination<kOthers, kX, T, const A*>(a.tensor.at(n, row), b.tensor.at(n, row), x.tensor.at(n, row),
                                                  a_weight, b_weight, x_weight, mean, plus));
    }
  });
}

}  // namespace

template <typename T>
void conditional_batch_norm_moments(Images images, Lines<const T> x, double* mean, double* squares, int threads) {
  const Tiles tiles(images);
  const int64_t numbers = tiles.parts() * images.channels;
  const Buffer<double> parts = make_buffer<double>(2 * numbers);  // (2, N, tiles of an image, C)
  double *means = parts.get(), *part_squares = means + numbers;
  for_each_task(tiles, threads, false, [=](const Task& task) {
    const int64_t first = task.tile * tiles.pixels, size = tiles.size(task.tile);
    const int64_t place = (task.n * tiles.per_image + task.tile) * images.channels;
    if (images.channels_last) {
      row_moments(x, task.n, first, size, images.channels, means + place, part_squares + place);
      return;
    }
    for (int64_t c = task.first_channel; c < task.end_channel; ++c)
      plane_moments(x.at(task.n, c) + first, size, means + place + c, part_squares + place + c);
  });
  merge(tiles, means, part_squares, mean, squares, threads);
}

template <typename T>
void conditional_batch_norm_sums(Images images, const Lines<const T>* v, Lines<const T> grad, Lines<const T> x,
                                 const accumulator_t<T>* mean, accumulator_t<T>* sums, int threads) {
  if (v == nullptr)
    sums_of_planes<false, T>(images, x, grad, x, mean, sums, threads);
  else
    sums_of_planes<true, T>(images, *v, grad, x, mean, sums, threads);
}

template <typename T>
void conditional_batch_norm_combine(Images images, const Term<T>* others, int count, const Term<T>* x,
                                    const accumulator_t<T>* mean, Planes<accumulator_t<T>> offset, Lines<T> out,
                                    int threads) {
  const auto chosen = x == nullptr ? combine<1, false, T>
                      : count == 0 ? combine<0, true, T>
                      : count == 1 ? combine<1, true, T>
                                   : combine<2, true, T>;
  chosen(images, others, x, mean, offset, out, threads);
}

#define GDL_INSTANTIATE(T)                                                                                    \
  template void conditional_batch_norm_moments<T>(Images, Lines<const T>, double*, double*, int);             \
  template void conditional_batch_norm_sums<T>(Images, const Lines<const T>*, Lines<const T>, Lines<const T>, \
                                               const accumulator_t<T>*, accumulator_t<T>*, int);              \
  template void conditional_batch_norm_combine<T>(Images, const Term<T>*, int, const Term<T>*,                \
                                                  const accumulator_t<T>*, Planes<accumulator_t<T>>, Lines<T>, int);
GDL_INSTANTIATE(float)
GDL_INSTANTIATE(double)
GDL_INSTANTIATE(float16)
GDL_INSTANTIATE(bfloat16)
#undef GDL_INSTANTIATE

}  // namespace gdl
