#include "conditional_batch_norm.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "buffer.h"
#include "conditional_batch_norm_passes.h"

// Between the passes there are numbers of planes, (N, C), and of channels, (C). xhat = (x - mean) * rstd, and m(t) is a
// channel's mean, over all ranks.

namespace gdl {
namespace {

using std::int64_t;

// Channels whose sums stay in L1 while the images are walked.
constexpr int64_t kStrip = 256;

bool is_empty(const Images& images) { return images.count * images.channels * images.pixels == 0; }
int64_t planes_of(const Images& images) { return images.count * images.channels; }
int64_t values_per_channel(const Images& images) { return images.count * images.pixels; }

// f(c, i) for the plane i of channel c.
template <typename F>
void for_each_plane(const Images& images, int threads, F f) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < images.count; ++n) {
    const int64_t first = n * images.channels;
#pragma GCC ivdep
    for (int64_t c = 0; c < images.channels; ++c) f(c, first + c);
  }
}

// means (count, C): m of what `term` gives, count numbers of a plane that are summed over its pixels.
template <int count, typename Term>
void mean_over_ranks(const Images& images, const Ranks& ranks, int threads, Term term) {
  const int64_t channels = images.channels, strips = (channels + kStrip - 1) / kStrip;
  double* const sums = ranks.numbers;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t first = strip * kStrip, end = std::min(first + kStrip, channels);
    for (int k = 0; k < count; ++k) std::fill(sums + k * channels + first, sums + k * channels + end, 0.0);
    for (int64_t n = 0; n < images.count; ++n) {
#pragma GCC ivdep
      for (int64_t c = first; c < end; ++c) {
        const auto terms = term(n * channels + c);
        for (int k = 0; k < count; ++k) sums[k * channels + c] += static_cast<double>(terms[k]);
      }
    }
  }
  const double values = std::max(ranks.merge(values_per_channel(images)), 1.0);
  for (int64_t i = 0; i < count * channels; ++i) sums[i] /= values;
}

// As conditional_batch_norm_sums, whose images have pixels.
template <typename T, typename A = accumulator_t<T>>
Buffer<A> sums_of_planes(const Images& images, const Lines<const T>* v, Lines<const T> grad, Lines<const T> x,
                         const A* mean, int threads) {
  const int64_t numbers = (v == nullptr ? 2 : 5) * planes_of(images);
  Buffer<A> sums = make_buffer<A>(numbers);
  if (is_empty(images))
    std::fill_n(sums.get(), numbers, A(0));
  else
    conditional_batch_norm_sums<T>(images, v, grad, x, mean, sums.get(), threads);
  return sums;
}

// out = the sum of weight * tensor over others, + weight * (x - mean), + offset.
template <typename T, size_t count>
void combine(const Images& images, const std::array<Term<T>, count>& others, const Term<T>* x,
             const accumulator_t<T>* mean, Planes<accumulator_t<T>> offset, Lines<T> out, int threads) {
  if (is_empty(images)) return;
  conditional_batch_norm_combine<T>(images, others.data(), static_cast<int>(count), x, mean, offset, out, threads);
}

// The mean, 1 / sqrt(var + eps) and unbiased variance of the batch.
template <typename T, typename A = accumulator_t<T>>
void put_statistics(const Images& images, Lines<const T> x, double eps, A* mean, A* rstd, A* unbiased_var,
                    const Ranks& ranks, int threads) {
  const int64_t channels = images.channels;
  double *means = ranks.numbers, *squares = means + channels;
  if (is_empty(images))
    std::fill_n(means, 2 * channels, 0.0);
  else
    conditional_batch_norm_moments<T>(images, x, means, squares, threads);
  const double values = ranks.merge(values_per_channel(images));
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<A>(means[c]);
    rstd[c] = static_cast<A>(1 / std::sqrt(squares[c] / std::max(values, 1.0) + eps));
    unbiased_var[c] = static_cast<A>(squares[c] / std::max(values - 1, 1.0));
  }
}

}  // namespace

template <typename T>
void conditional_batch_norm_forward(Images images, Lines<const T> x, const accumulator_t<T>* gain,
                                    const accumulator_t<T>* bias, const accumulator_t<T>* given_mean,
                                    const accumulator_t<T>* given_var, double eps, Lines<T> y,
                                    accumulator_t<T>* statistics, const Ranks& ranks, int threads) {
  using A = accumulator_t<T>;
  const int64_t channels = images.channels;
  A *mean = statistics, *rstd = mean + channels, *var = rstd + channels;
  if (given_mean == nullptr) {
    put_statistics(images, x, eps, mean, rstd, var, ranks, threads);
  } else {
    std::copy_n(given_mean, channels, mean);
    std::copy_n(given_var, channels, var);
    for (int64_t c = 0; c < channels; ++c) rstd[c] = static_cast<A>(1 / std::sqrt(static_cast<double>(var[c]) + eps));
  }
  const Buffer<A> memory = make_buffer<A>(planes_of(images));
  A* const scale = memory.get();
  for_each_plane(images, threads, [=](int64_t c, int64_t i) { scale[i] = gain[i] * rstd[c]; });
  const Term<T> centred{x, {scale, channels}};
  combine<T, 0>(images, {}, &centred, mean, {bias, channels}, y, threads);
}

// grad_x = rstd (gain g - m(gain g) - xhat m(gain g xhat)); in evaluation both means are 0.
template <typename T>
void conditional_batch_norm_backward(Images images, Lines<const T> grad, Lines<const T> x, const accumulator_t<T>* gain,
                                     const accumulator_t<T>* statistics, bool training, Lines<T> grad_x,
                                     accumulator_t<T>* grad_gain, accumulator_t<T>* grad_bias, const Ranks& ranks,
                                     int threads) {
  using A = accumulator_t<T>;
  const int64_t channels = images.channels, planes = planes_of(images);
  const A *mean = statistics, *rstd = mean + channels;
  const Buffer<A> sums = sums_of_planes<T>(images, nullptr, grad, x, mean, threads);
  const A *g = sums.get(), *gx = g + planes;
  const Buffer<A> memory = make_buffer<A>(planes + 2 * channels);
  A *scale = memory.get(), *x_weight = scale + planes, *offset = x_weight + channels;
  for_each_plane(images, threads, [=](int64_t c, int64_t i) {
    grad_bias[i] = g[i];
    grad_gain[i] = gx[i] * rstd[c];
    scale[i] = gain[i] * rstd[c];
  });
  const std::array<Term<T>, 1> scaled_grad{{{grad, {scale, channels}}}};
  if (!training) {
    std::fill_n(offset, channels, A(0));
    combine<T>(images, scaled_grad, nullptr, mean, {offset, 0}, grad_x, threads);
    return;
  }
  mean_over_ranks<2>(images, ranks, threads,
                     [=](int64_t i) { return std::array{gain[i] * grad_bias[i], gain[i] * grad_gain[i]}; });
  const double *m_g = ranks.numbers, *m_gx = m_g + channels;
  for (int64_t c = 0; c < channels; ++c) {
    const double r = rstd[c];
    x_weight[c] = static_cast<A>(-m_gx[c] * r * r);
    offset[c] = static_cast<A>(-m_g[c] * r);
  }
  const Term<T> centred{x, {x_weight, 0}};
  combine<T>(images, scaled_grad, &centred, mean, {offset, 0}, grad_x, threads);
}

// The gradient of <v, grad_x> + <v_gain, grad_gain> + <v_bias, grad_bias>.
template <typename T>
void conditional_batch_norm_double_backward(Images images, Lines<const T> v, const accumulator_t<T>* v_gain,
                                            const accumulator_t<T>* v_bias, Lines<const T> grad, Lines<const T> x,
                                            const accumulator_t<T>* gain, const accumulator_t<T>* statistics,
                                            bool training, Lines<T> of_grad, Lines<T> of_x, accumulator_t<T>* of_gain,
                                            const Ranks& ranks, int threads) {
  using A = accumulator_t<T>;
  const int64_t channels = images.channels, planes = planes_of(images);
  const A *mean = statistics, *rstd = mean + channels;
  const Buffer<A> sums = sums_of_planes<T>(images, &v, grad, x, mean, threads);
  A *g = sums.get(), *gx = g + planes, *s_v = gx + planes, *s_vx = s_v + planes, *vg = s_vx + planes;
  const Buffer<A> memory = make_buffer<A>(3 * planes + 2 * channels);
  // Of v, and of x where grad gets something and of grad where x does.
  A *scale = memory.get(), *along = scale + planes, *grad_offset = along + planes;
  A *x_weight = grad_offset + planes, *x_offset = x_weight + channels;
  for_each_plane(images, threads, [=](int64_t c, int64_t i) {
    gx[i] *= rstd[c];
    s_vx[i] *= rstd[c];
    scale[i] = gain[i] * rstd[c];
  });
  const Term<T> scaled_v{v, {scale, channels}}, x_along{x, {along, channels}}, grad_along{grad, {along, channels}};
  if (!training) {
    for_each_plane(images, threads, [=](int64_t c, int64_t i) {
      of_gain[i] = rstd[c] * vg[i];
      along[i] = v_gain[i] * rstd[c];
    });
    std::fill_n(x_offset, channels, A(0));
    combine<T, 1>(images, {scaled_v}, &x_along, mean, {v_bias, channels}, of_grad, threads);
    combine<T, 1>(images, {grad_along}, nullptr, mean, {x_offset, 0}, of_x, threads);
    return;
  }
  mean_over_ranks<7>(images, ranks, threads, [=](int64_t i) {
    return std::array{s_v[i],          s_vx[i],          gain[i] * g[i],   gain[i] * gx[i],
                      gain[i] * vg[i], v_gain[i] * g[i], v_gain[i] * gx[i]};
  });
  const double *m_v = ranks.numbers, *m_vx = m_v + channels, *m_g = m_vx + channels, *m_gx = m_g + channels,
               *m_vg = m_gx + channels, *m_t = m_vg + channels, *m_tx = m_t + channels;
  // t = (v_gain - gain rstd m(v xhat)) g - rstd m(gain g xhat) v is what xhat gets, rstd gets the spread.
  for_each_plane(images, threads, [=](int64_t c, int64_t i) {
    const double r = rstd[c], s = scale[i];
    of_gain[i] = static_cast<A>(r * (vg[i] - m_v[c] * g[i] - m_vx[c] * gx[i]));
    along[i] = static_cast<A>((v_gain[i] - s * m_vx[c]) * r);
    grad_offset[i] = static_cast<A>(v_bias[i] - s * m_v[c]);
  });
  const Buffer<A> v_weight = make_buffer<A>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double r = rstd[c];
    const double t_mean = m_t[c] - r * (m_gx[c] * m_v[c] + m_vx[c] * m_g[c]);
    const double t_x = m_tx[c] - 2 * r * m_gx[c] * m_vx[c];
    const double spread = m_vg[c] - m_v[c] * m_g[c] - m_vx[c] * m_gx[c];
    v_weight[c] = static_cast<A>(-m_gx[c] * r * r);
    x_weight[c] = static_cast<A>(-(t_x + r * spread) * r * r);
    x_offset[c] = static_cast<A>(-t_mean * r);
  }
  const Term<T> weighted_v{v, {v_weight.get(), 0}}, weighted_x{x, {x_weight, 0}};
  combine<T, 1>(images, {scaled_v}, &x_along, mean, {grad_offset, channels}, of_grad, threads);
  combine<T, 2>(images, {weighted_v, grad_along}, &weighted_x, mean, {x_offset, 0}, of_x, threads);
}

template <typename R, typename A>
void conditional_batch_norm_move(R* running, int64_t stride, const A* batch, int64_t channels, double momentum) {
  for (int64_t c = 0; c < channels; ++c) {
    R& moved = running[c * stride];
    const double from = to_accumulator(moved), to = batch[c], way = to - from;
    // From the nearer end, as torch's lerp: a momentum of 1 gives exactly what is moved to.
    const double value = momentum < 0.5 ? from + momentum * way : to - (1 - momentum) * way;
    moved = from_accumulator<R>(static_cast<accumulator_t<R>>(value));
  }
}

#define GDL_INSTANTIATE(T)                                                                                           \
  template void conditional_batch_norm_forward<T>(                                                                   \
      Images, Lines<const T>, const accumulator_t<T>*, const accumulator_t<T>*, const accumulator_t<T>*,             \
      const accumulator_t<T>*, double, Lines<T>, accumulator_t<T>*, const Ranks&, int);                              \
  template void conditional_batch_norm_backward<T>(Images, Lines<const T>, Lines<const T>, const accumulator_t<T>*,  \
                                                   const accumulator_t<T>*, bool, Lines<T>, accumulator_t<T>*,       \
                                                   accumulator_t<T>*, const Ranks&, int);                            \
  template void conditional_batch_norm_double_backward<T>(Images, Lines<const T>, const accumulator_t<T>*,           \
                                                          const accumulator_t<T>*, Lines<const T>, Lines<const T>,   \
                                                          const accumulator_t<T>*, const accumulator_t<T>*, bool,    \
                                                          Lines<T>, Lines<T>, accumulator_t<T>*, const Ranks&, int); \
  template void conditional_batch_norm_move<T, float>(T*, int64_t, const float*, int64_t, double);                   \
  template void conditional_batch_norm_move<T, double>(T*, int64_t, const double*, int64_t, double);
GDL_INSTANTIATE(float)
GDL_INSTANTIATE(double)
GDL_INSTANTIATE(float16)
GDL_INSTANTIATE(bfloat16)
#undef GDL_INSTANTIATE

}  // namespace gdl
