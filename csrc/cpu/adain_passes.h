// How a pass goes over images: it sums something over every plane, finds a few numbers for the plane from the sums, and
// writes something that depends on them.
//
// A pass says what in expressions of a place in a line (elementwise.h), and is walked in either of two ways. Planes: a
// line is a piece of a plane; the plane is still in the caches when it is written. Channels last: a line is a pixel's
// channels, every channel has sums of its own, and the numbers of the planes change along the line.
//
// Sums are taken piece by piece, of fixed size, and added in a fixed order in double: so they don't hang on the number
// of threads, and their rounding does not grow with the plane.
//
// The second look at a piece, in the L1, is when memory has nothing to do: then the numbers behind it are fetched,
// mostly those of the next. 0.88 times as long on an AMD EPYC, 2 threads, planes of 64x64 and 128x128.
#pragma once

#include <algorithm>
#include <vector>

#include "adain.h"
#include "buffer.h"
#include "elementwise.h"

namespace gdl {

using std::int64_t;

// Numbers of a piece of a plane: in float 16 KB, so that a second look at it finds it in the L1.
constexpr int64_t kPiece = 4096;
// Numbers of some rows of pixels, which with those of two more tensors stay in the L2, and rows at most: they are added
// one after the other.
constexpr int64_t kRowsSize = 16384;
constexpr int64_t kRows = 64;
// Numbers worth sharing an image with another thread for.
constexpr int64_t kShare = 65536;

// Where a pass is: x, what is read besides, and what turns x into h there. P: a plane's number or, with channels last,
// a pointer to those of neighbouring channels. Z: the other way round.
template <typename E, typename P, typename Z>
struct Place {
  const E *x, *grad, *v;
  Z noise;
  P weight, bias;
};

// What passes read.
template <typename E, bool active>
struct Source {
  using T = accumulator_t<E>;

  Images images;
  Prologue<T> prologue;
  Lines<const E> x, grad, v;
  Buffer<T> zeros;  // for noise, weights or biases that aren't there

  Source(const Images& images, const Prologue<T>& prologue, Lines<const E> x, Lines<const E> grad = {},
         Lines<const E> v = {})
      : images(images), prologue(prologue), x(x), grad(grad), v(v) {
    const int64_t count = std::max(kPiece, images.channels);
    zeros = make_buffer<T>(count);
    std::fill_n(zeros.get(), count, T(0));
  }

  static const E* at(const Lines<const E>& lines, int64_t n, int64_t line, int64_t first) {
    return lines.data == nullptr ? nullptr : lines.at(n, line) + first;
  }

  Place<E, T, const T*> in_plane(int64_t n, int64_t c, int64_t first) const {
    const T* noise = prologue.noise == nullptr ? zeros.get() : prologue.noise + n * prologue.image + first;
    return {at(x, n, c, first),
            at(grad, n, c, first),
            at(v, n, c, first),
            noise,
            prologue.weight == nullptr ? T(0) : prologue.weight[c],
            prologue.bias == nullptr ? T(0) : prologue.bias[c]};
  }

  Place<E, const T*, T> in_pixel(int64_t n, int64_t pixel) const {
    const T noise = prologue.noise == nullptr ? T(0) : prologue.noise[n * prologue.image + pixel];
    return {at(x, n, pixel, 0),
            at(grad, n, pixel, 0),
            at(v, n, pixel, 0),
            noise,
            prologue.weight == nullptr ? zeros.get() : prologue.weight,
            prologue.bias == nullptr ? zeros.get() : prologue.bias};
  }

  // value where u is positive, slope * value elsewhere: the activation if value is u, else its gradient.
  template <typename U>
  U leaky(const U& u, const U& value) const {
    if constexpr (active)
      return u > T(0) ? value : value * prologue.slope;
    else
      return value;
  }

  template <typename At, typename Place>
  auto u(const At& at, const Place& here) const {
    if constexpr (active)
      return at(here.x) + at(here.weight) * at(here.noise) + at(here.bias);
    else
      return at(here.x);
  }

  template <typename At, typename Place>
  auto h(const At& at, const Place& here) const {
    const auto before = u(at, here);
    return leaky(before, before);
  }
};

// Mean and sum of squared deviations of some numbers: they don't cancel where the mean is large beside the deviations.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // From sums over what is left of the numbers beside a centre near their mean, which it need not be: the mean of many
  // numbers as they are summed is rounded.
  static Moments about(double centre, double count, double sum, double sum_of_squares) {
    const double apart = sum / count;
    return {count, centre + apart, sum_of_squares - sum * apart};
  }

  void add(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, apart = other.mean - mean;
    mean += apart * (other.count / total);
    squares += other.squares + apart * apart * (count * other.count / total);
    count = total;
  }
};

template <int size>
struct Sums {
  std::array<double, size> of = {};

  void add(const Sums& other) {
    for (int k = 0; k < size; ++k) of[k] += other.of[k];
  }
};

// ---- planes

template <typename T, typename Pass>
auto piece_of_plane(const Pass& pass, int64_t n, int64_t c, int64_t first, int64_t count, const T* given) {
  const auto here = pass.source.in_plane(n, c, first);
  if constexpr (Pass::kMoments) {
    const T mean = sum_up<T>(count, [&](auto at) { return pass.source.h(at, here); })[0] / static_cast<T>(count);
    const auto [sum, squares] = sum_up<T>(
        count,
        [&](auto at) {
          __builtin_prefetch(here.x + count + at.i);
          return pass.source.h(at, here) - mean;
        },
        [&](auto at) {
          const auto apart = pass.source.h(at, here) - mean;
          return apart * apart;
        });
    return Moments::about(mean, static_cast<double>(count), sum, squares);
  } else {
    const auto sums = pass.sums([&](auto... terms) { return sum_up<T>(count, terms...); }, here, given);
    typename Pass::Total total;
    std::copy(sums.begin(), sums.end(), total.of.begin());
    return total;
  }
}

template <typename T, typename Pass>
Sums<Pass::kAfter> write_piece(const Pass& pass, int64_t n, int64_t c, int64_t first, int64_t count, const T* numbers) {
  T own[Pass::kNumbers];  // or the compiler would load them again after every store
  std::copy_n(numbers, Pass::kNumbers, own);
  Sums<Pass::kAfter> after;
  pass.write(
      [&](const auto& out, auto value, auto... terms) {
        const auto sums = gdl::write(out.at(n, c) + first, count, value, terms...);
        std::copy(sums.begin(), sums.end(), after.of.begin());
      },
      pass.source.in_plane(n, c, first), own);
  return after;
}

template <typename Pass>
void over_planes(const Pass& pass, int threads) {
  using T = typename Pass::T;
  using Total = typename Pass::Total;
  using After = Sums<Pass::kAfter>;
  const Images& images = pass.source.images;
  const int64_t pieces = (images.pixels + kPiece - 1) / kPiece, planes = images.count * images.channels;
  const auto size_of = [&](int64_t piece) { return std::min(kPiece, images.pixels - piece * kPiece); };

  if (planes >= threads || pieces < 2 * threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t plane = 0; plane < planes; ++plane) {
      const int64_t n = plane / images.channels, c = plane % images.channels;
      T given[Pass::kGiven + 1], numbers[Pass::kNumbers + 1];
      pass.given(n, c, given);
      Total total;
      for (int64_t i = 0; i < pieces; ++i) total.add(piece_of_plane<T>(pass, n, c, i * kPiece, size_of(i), given));
      pass.numbers(n, c, total, numbers);
      After after;
      if constexpr (Pass::kNumbers > 0)
        for (int64_t i = 0; i < pieces; ++i) after.add(write_piece<T>(pass, n, c, i * kPiece, size_of(i), numbers));
      pass.finish(n, c, after);
    }
    return;
  }
  std::vector<Total> totals(pieces);
  std::vector<After> afters(pieces);
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int64_t n = plane / images.channels, c = plane % images.channels;
    T given[Pass::kGiven + 1], numbers[Pass::kNumbers + 1];
    pass.given(n, c, given);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < pieces; ++i) totals[i] = piece_of_plane<T>(pass, n, c, i * kPiece, size_of(i), given);
    Total total;
    for (const Total& one : totals) total.add(one);
    pass.numbers(n, c, total, numbers);
    After after;
    if constexpr (Pass::kNumbers > 0) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t i = 0; i < pieces; ++i) afters[i] = write_piece<T>(pass, n, c, i * kPiece, size_of(i), numbers);
      for (const After& one : afters) after.add(one);
    }
    pass.finish(n, c, after);
  }
}

// ---- channels last

// sums[k * channels + c] = the sum over some rows of the k-th term of channel c. expression(run, row) calls run with
// the terms, in which `at` stands for a place among the channels.
template <typename T, int size, typename Expression>
void sum_columns(int64_t rows, int64_t channels, T* sums, Expression expression) {
  constexpr int columns = std::max(1, 64 / static_cast<int>(sizeof(Vec<T>)));  // a line of the cache
  const auto vectors = [&](int64_t i, auto count) {
    Vec<T> sum[size][count.value];
    for (auto& term : sum)
      for (auto& column : term) column = Vec<T>{};
    for (int64_t row = 0; row < rows; ++row)
      expression(
          [&](auto... terms) {
#pragma GCC unroll 4
            for (int j = 0; j < count.value; ++j) {
              int k = 0;
              ((sum[k++][j] += terms(VectorAt<T>{i + j * kWidth<T>})), ...);
            }
          },
          row);
    for (int k = 0; k < size; ++k)
      for (int j = 0; j < count.value; ++j) store<T>(sums + k * channels + i + j * kWidth<T>, sum[k][j]);
  };
  int64_t i = 0;
  for (; i + columns * kWidth<T> <= channels; i += columns * kWidth<T>)
    vectors(i, std::integral_constant<int, columns>{});
  for (; i + kWidth<T> <= channels; i += kWidth<T>) vectors(i, std::integral_constant<int, 1>{});
  for (; i < channels; ++i) {
    T sum[size] = {};
    for (int64_t row = 0; row < rows; ++row)
      expression(
          [&](auto... terms) {
            int k = 0;
            ((sum[k++] += terms(NumberAt<T>{i})), ...);
          },
          row);
    for (int k = 0; k < size; ++k) sums[k * channels + i] = sum[k];
  }
}

// Adds some rows of pixels to every channel's total. scratch: three numbers a channel for moments, else the pass's
// sums.
template <typename T, typename Pass>
void add_rows(const Pass& pass, int64_t n, int64_t first, int64_t rows, const T* const* given, T* scratch,
              typename Pass::Total* totals) {
  const int64_t channels = pass.source.images.channels;
  if constexpr (Pass::kMoments) {
    T *mean = scratch, *sums = scratch + channels;
    sum_columns<T, 1>(rows, channels, mean, [&](auto run, int64_t row) {
      const auto here = pass.source.in_pixel(n, first + row);
      run([&](auto at) { return pass.source.h(at, here); });
    });
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<T>(rows);
    const T* centre = mean;
    sum_columns<T, 2>(rows, channels, sums, [&](auto run, int64_t row) {
      const auto here = pass.source.in_pixel(n, first + row);
      run(
          [&](auto at) {
            __builtin_prefetch(here.x + rows * channels + at.i);
            return pass.source.h(at, here) - at(centre);
          },
          [&](auto at) {
            const auto apart = pass.source.h(at, here) - at(centre);
            return apart * apart;
          });
    });
    for (int64_t c = 0; c < channels; ++c)
      totals[c].add(Moments::about(mean[c], static_cast<double>(rows), sums[c], sums[channels + c]));
  } else {
    sum_columns<T, Pass::kSums>(rows, channels, scratch, [&](auto run, int64_t row) {
      pass.sums(run, pass.source.in_pixel(n, first + row), given);
    });
    for (int64_t c = 0; c < channels; ++c)
      for (int k = 0; k < Pass::kSums; ++k) totals[c].of[k] += scratch[k * channels + c];
  }
}

// scratch: the pass's sums after writing, of every channel.
template <typename T, typename Pass>
void write_rows(const Pass& pass, int64_t n, int64_t first, int64_t rows, const T* const* numbers, T* scratch,
                Sums<Pass::kAfter>* afters) {
  const int64_t channels = pass.source.images.channels;
  std::fill_n(scratch, Pass::kAfter * channels, T(0));
  for (int64_t pixel = first; pixel < first + rows; ++pixel)
    pass.write(
        [&](const auto& out, auto value, auto... terms) {
          auto* to = out.at(n, pixel);
          int64_t i = 0;
          for (; i + kWidth<T> <= channels; i += kWidth<T>) {
            const VectorAt<T> at{i};
            const Vec<T> v = value(at);
            store_rounded(to + i, v);
            [[maybe_unused]] T* sum = scratch + i;
            ((store<T>(sum, load(sum) + terms(at, v)), sum += channels), ...);
          }
          for (; i < channels; ++i) {
            const NumberAt<T> at{i};
            const T v = value(at);
            to[i] = from_accumulator<typename Pass::E>(v);
            [[maybe_unused]] T* sum = scratch + i;
            ((*sum += terms(at, v), sum += channels), ...);
          }
        },
        pass.source.in_pixel(n, pixel), numbers);
  if constexpr (Pass::kAfter > 0)
    for (int64_t c = 0; c < channels; ++c)
      for (int k = 0; k < Pass::kAfter; ++k) afters[c].of[k] += scratch[k * channels + c];
}

// One image. `threads` of them share its parts.
template <typename Pass>
void over_channels(const Pass& pass, int64_t n, int threads) {
  using T = typename Pass::T;
  using Total = typename Pass::Total;
  using After = Sums<Pass::kAfter>;
  const Images& images = pass.source.images;
  const int64_t channels = images.channels;
  const int64_t part_rows = std::max<int64_t>(1, kShare / channels),
                step = std::clamp<int64_t>(kRowsSize / channels, 1, kRows);
  const int64_t parts = (images.pixels + part_rows - 1) / part_rows;
  std::vector<T> given(Pass::kGiven * channels), numbers(Pass::kNumbers * channels);
  const T *given_rows[Pass::kGiven + 1], *numbers_rows[Pass::kNumbers + 1];
  for (int k = 0; k < Pass::kGiven; ++k) given_rows[k] = given.data() + k * channels;
  for (int k = 0; k < Pass::kNumbers; ++k) numbers_rows[k] = numbers.data() + k * channels;
  for (int64_t c = 0; c < channels; ++c) {
    T one[Pass::kGiven + 1];
    pass.given(n, c, one);
    for (int k = 0; k < Pass::kGiven; ++k) given[k * channels + c] = one[k];
  }
  std::vector<Total> totals(parts * channels);
  std::vector<After> afters(parts * channels);
  const auto for_rows = [&](int64_t scratch_size, auto work) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      const Buffer<T> scratch = make_buffer<T>(scratch_size * channels);
      const int64_t end = std::min(images.pixels, (part + 1) * part_rows);
      for (int64_t row = part * part_rows; row < end; row += step)
        work(part * channels, row, std::min(step, end - row), scratch.get());
    }
  };
  for_rows(std::max(3, Pass::kSums), [&](int64_t slot, int64_t first, int64_t rows, T* scratch) {
    add_rows<T>(pass, n, first, rows, given_rows, scratch, &totals[slot]);
  });
  for (int64_t c = 0; c < channels; ++c) {
    Total total;
    for (int64_t part = 0; part < parts; ++part) total.add(totals[part * channels + c]);
    T one[Pass::kNumbers + 1];
    pass.numbers(n, c, total, one);
    for (int k = 0; k < Pass::kNumbers; ++k) numbers[k * channels + c] = one[k];
  }
  if constexpr (Pass::kNumbers > 0)
    for_rows(Pass::kAfter, [&](int64_t slot, int64_t first, int64_t rows, T* scratch) {
      write_rows<T>(pass, n, first, rows, numbers_rows, scratch, &afters[slot]);
    });
  for (int64_t c = 0; c < channels; ++c) {
    After after;
    for (int64_t part = 0; part < parts; ++part) after.add(afters[part * channels + c]);
    pass.finish(n, c, after);
  }
}

template <typename Pass>
void go_over(const Pass& pass, int threads) {
  const Images& images = pass.source.images;
  if (!images.channels_last) {
    over_planes(pass, threads);
  } else if (images.channels * images.pixels < 2 * kShare && images.count > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < images.count; ++n) over_channels(pass, n, 1);
  } else {
    for (int64_t n = 0; n < images.count; ++n) over_channels(pass, n, threads);
  }
}

}  // namespace gdl
