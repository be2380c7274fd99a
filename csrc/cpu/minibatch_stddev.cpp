#include "minibatch_stddev.h"

#include <algorithm>
#include <vector>

#include "elementwise.h"

namespace gdl {
namespace {

using std::int64_t;

// Numbers of a line that are worked on at a time: those of a usual group stay in L1 from the first look to the last.
constexpr int64_t kRun = 256;

// Places that make a task. Sums are taken by tasks, whose size no number of threads changes.
constexpr int64_t kTask = 4096;

// A feature of one image: `lines` lines of `run` numbers.
struct Feature {
  Images images;
  int64_t features, lines, run, tiles_a_line, tiles, tiles_a_task, tasks;

  // With whole channels next to each other in every tensor a feature is one line.
  Feature(const Images& images, int64_t features, bool joined) : images(images), features(features) {
    const int64_t channels = images.channels / features;
    lines = images.channels_last ? images.pixels : joined ? 1 : channels;
    run = images.channels_last ? channels : joined ? channels * images.pixels : images.pixels;
    tiles_a_line = (run + kRun - 1) / kRun;
    tiles = lines * tiles_a_line;
    tiles_a_task = std::max<int64_t>(1, kTask / std::min(run, kRun));
    tasks = (tiles + tiles_a_task - 1) / tiles_a_task;
  }

  // Where a tile of feature f of image n begins.
  template <typename T>
  T* at(const Lines<T>& tensor, int64_t n, int64_t f, int64_t tile) const {
    const int64_t line = tile / tiles_a_line, first = tile % tiles_a_line * kRun;
    if (images.channels_last) return tensor.at(n, line) + f * run + first;
    if (lines == 1) return tensor.at(n, f * (images.channels / features)) + first;
    return tensor.at(n, f * lines + line) + first;
  }

  int64_t length(int64_t tile) const { return std::min(kRun, run - tile % tiles_a_line * kRun); }

  // f(tile) for every tile of a task.
  template <typename F>
  void for_each_tile(int64_t task, F f) const {
    const int64_t end = std::min(tiles, (task + 1) * tiles_a_task);
    for (int64_t tile = task * tiles_a_task; tile < end; ++tile) f(tile);
  }
};

// The same place in every member of a group: `step` numbers apart. kCount members where that is known to the compiler,
// which then keeps them in registers from one look to the next; else 0.
template <typename T, int kCount>
struct Members {
  const T* first;
  int64_t step, count;

  int64_t size() const { return kCount > 0 ? kCount : count; }

  // By how much the mean is above the first member. Differences first: of members that are close to each other they are
  // exact, and neither the variance nor a deviation cancels where the mean is large.
  template <typename At>
  auto mean(At at) const {
    auto sum = at(first) - at(first);
    for (int64_t g = 1; g < size(); ++g) sum += at(first + g * step) - at(first);
    return sum / static_cast<accumulator_t<T>>(size());
  }

  template <typename At, typename Mean>
  auto stddev(At at, Mean mean, accumulator_t<T> eps) const {
    auto sum = mean * mean;  // of the first member
    for (int64_t g = 1; g < size(); ++g) {
      const auto deviation = at(first + g * step) - at(first) - mean;
      sum += deviation * deviation;
    }
    return square_root(sum / static_cast<accumulator_t<T>>(size()) + eps);
  }
};

template <typename T>
bool joined(const Images& images, const Lines<T>& tensor) {
  return tensor.line == images.pixels;
}

// The sum of one channel of one image. In double from run to run.
template <typename T>
double sum_of_channel(const Images& images, const Lines<const T>& tensor, int64_t n, int64_t channel) {
  double sum = 0;
  if (images.channels_last) {
    for (int64_t p = 0; p < images.pixels; ++p) sum += to_accumulator(tensor.at(n, p)[channel]);
  } else {
    for (int64_t p = 0; p < images.pixels; p += kRun) {
      const T* pixels = tensor.at(n, channel) + p;
      sum += sum_up<accumulator_t<T>>(std::min(kRun, images.pixels - p), [=](auto at) { return at(pixels); })[0];
    }
  }
  return sum;
}

template <typename T>
void fill_channel(const Images& images, const Lines<T>& tensor, int64_t n, int64_t channel, T value) {
  if (images.channels_last) {
    for (int64_t p = 0; p < images.pixels; ++p) tensor.at(n, p)[channel] = value;
  } else {
    std::fill_n(tensor.at(n, channel), images.pixels, value);
  }
}

template <typename T, int kCount>
void forward(Images images, Grouping grouping, double eps, Lines<const T> x, Lines<T> y, int threads) {
  if (images.count == 0) return;
  using A = accumulator_t<T>;
  const int64_t groups = images.count / grouping.group, features = grouping.features;
  const Feature feature(images, features, joined(images, x) && joined(images, y));
  std::vector<double> sums(groups * features * feature.tasks);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < static_cast<int64_t>(sums.size()); ++task) {
      const int64_t m = task / feature.tasks / features, f = task / feature.tasks % features;
      double sum = 0;
      feature.for_each_tile(task % feature.tasks, [&](int64_t tile) {
        const int64_t n = feature.length(tile);
        for (int64_t g = 0; g < grouping.group; ++g)
          std::copy_n(feature.at(x, g * groups + m, f, tile), n, feature.at(y, g * groups + m, f, tile));
        const Members<T, kCount> members{feature.at(x, m, f, tile), groups * x.image, grouping.group};
        sum += sum_up<A>(n, [=](auto at) { return members.stddev(at, members.mean(at), static_cast<A>(eps)); })[0];
      });
      sums[task] = sum;
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < images.count * features; ++task) {
      const int64_t n = task / features, f = task % features;
      double sum = 0;
      for (int64_t i = 0; i < feature.tasks; ++i) sum += sums[(n % groups * features + f) * feature.tasks + i];
      const double mean = sum / (static_cast<double>(feature.lines) * feature.run);
      fill_channel(images, y, n, images.channels + f, from_accumulator<T>(static_cast<A>(mean)));
    }
  }
}

template <typename T, int kCount>
void backward(Images images, Grouping grouping, double eps, Lines<const T> grad, Lines<const T> x, Lines<T> dx,
              int threads) {
  if (images.count == 0) return;
  using A = accumulator_t<T>;
  const int64_t groups = images.count / grouping.group, features = grouping.features;
  const Feature feature(images, features, joined(images, grad) && joined(images, x) && joined(images, dx));
  std::vector<double> sums(images.count * features);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < images.count * features; ++task)
      sums[task] = sum_of_channel(images, grad, task / features, images.channels + task % features);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < groups * features * feature.tasks; ++task) {
      const int64_t m = task / feature.tasks / features, f = task / feature.tasks % features;
      double sum = 0;
      for (int64_t g = 0; g < grouping.group; ++g) sum += sums[(g * groups + m) * features + f];
      const double count = static_cast<double>(grouping.group) * feature.lines * feature.run;
      const A share = static_cast<A>(sum / count);
      alignas(64) A mean[kRun], factor[kRun];
      feature.for_each_tile(task % feature.tasks, [&](int64_t tile) {
        const int64_t n = feature.length(tile);
        const Members<T, kCount> members{feature.at(x, m, f, tile), groups * x.image, grouping.group};
        const A* means = mean;
        const A* factors = factor;
        write(mean, n, [=](auto at) { return members.mean(at); });
        write(factor, n, [=](auto at) { return share / members.stddev(at, at(means), static_cast<A>(eps)); });
        for (int64_t g = 0; g < grouping.group; ++g) {
          const T* in = feature.at(x, g * groups + m, f, tile);
          const T* copied = feature.at(grad, g * groups + m, f, tile);
          write(feature.at(dx, g * groups + m, f, tile), n,
                [=](auto at) { return at(copied) + (at(in) - at(members.first) - at(means)) * at(factors); });
        }
      });
    }
  }
}

}  // namespace

template <typename T>
void minibatch_stddev_forward(Images images, Grouping grouping, double eps, Lines<const T> x, Lines<T> y, int threads) {
  (grouping.group == 4 ? forward<T, 4> : forward<T, 0>)(images, grouping, eps, x, y, threads);
}

template <typename T>
void minibatch_stddev_backward(Images images, Grouping grouping, double eps, Lines<const T> grad, Lines<const T> x,
                               Lines<T> dx, int threads) {
  (grouping.group == 4 ? backward<T, 4> : backward<T, 0>)(images, grouping, eps, grad, x, dx, threads);
}

#define GDL_INSTANTIATE(T)                                                                            \
  template void minibatch_stddev_forward<T>(Images, Grouping, double, Lines<const T>, Lines<T>, int); \
  template void minibatch_stddev_backward<T>(Images, Grouping, double, Lines<const T>, Lines<const T>, Lines<T>, int);
GDL_INSTANTIATE(float)
GDL_INSTANTIATE(double)
GDL_INSTANTIATE(float16)
GDL_INSTANTIATE(bfloat16)
#undef GDL_INSTANTIATE

}  // namespace gdl
