#include "adain.h"

#include <cmath>

#include "adain_passes.h"

namespace gdl {
namespace {

// Where a plane's numbers are in an (N, C) array.
int64_t place_of(const Images& images, int64_t n, int64_t c) { return n * images.channels + c; }

template <typename E_, bool active>
struct Forward {
  using E = E_;
  using T = accumulator_t<E>;
  using Total = Moments;
  static constexpr bool kMoments = true;
  static constexpr int kGiven = 0, kSums = 0, kNumbers = 3, kAfter = 0;

  Source<E, active> source;
  double eps;
  const T *scale, *shift;
  Lines<E> y;
  T *mean, *rstd;

  void given(int64_t, int64_t, T*) const {}

  void numbers(int64_t n, int64_t c, const Moments& h, T* out) const {
    const int64_t i = place_of(source.images, n, c);
    mean[i] = static_cast<T>(h.mean);
    rstd[i] = static_cast<T>(1 / std::sqrt(h.squares / h.count + eps));
    out[0] = mean[i], out[1] = scale[i] * rstd[i];
    out[2] = static_cast<T>(shift[i] - (h.mean - mean[i]) * out[1]);  // what rounding took from the mean
  }

  template <typename Write, typename Place, typename P>
  void write(Write write, const Place& here, const P* k) const {
    write(y, [&](auto at) { return (source.h(at, here) - at(k[0])) * at(k[1]) + at(k[2]); });
  }

  void finish(int64_t, int64_t, const Sums<0>&) const {}
};

template <typename E_>
struct Statistics {
  using E = E_;
  using T = accumulator_t<E>;
  using Total = Moments;
  static constexpr bool kMoments = true;
  static constexpr int kGiven = 0, kSums = 0, kNumbers = 0, kAfter = 0;

  Source<E, false> source;
  double eps;
  T *mean, *deviation;

  void given(int64_t, int64_t, T*) const {}

  void numbers(int64_t n, int64_t c, const Moments& x, T*) const {
    const int64_t i = place_of(source.images, n, c);
    mean[i] = static_cast<T>(x.mean);
    deviation[i] = static_cast<T>(std::sqrt(x.squares / x.count + eps));
  }

  void finish(int64_t, int64_t, const Sums<0>&) const {}
};

// With hh = (h - mean) rstd and means over the plane m(.):
//   dscale = sum g hh, dshift = sum g, dh = scale rstd (g - m(g) - hh m(g hh)), dx = dh where u > 0, else slope dh.
// The mean was rounded, so hh is off by its own mean, which is taken from it.
template <typename E_, bool active>
struct Backward {
  using E = E_;
  using T = accumulator_t<E>;
  using Total = Sums<3>;
  static constexpr bool kMoments = false;
  static constexpr int kGiven = 2, kSums = 3, kNumbers = 6, kAfter = active ? 2 : 0;

  Source<E, active> source;
  Modulation<T> modulation;
  Lines<E> dx;
  PlaneGradients<T> gradients;

  void given(int64_t n, int64_t c, T* out) const {
    const int64_t i = place_of(source.images, n, c);
    out[0] = modulation.mean[i], out[1] = modulation.rstd[i];
  }

  template <typename Run, typename Place, typename P>
  auto sums(Run run, const Place& here, const P* k) const {
    return run([&](auto at) { return at(here.grad); },
               [&](auto at) { return (source.h(at, here) - at(k[0])) * at(k[1]); },
               [&](auto at) { return at(here.grad) * ((source.h(at, here) - at(k[0])) * at(k[1])); });
  }

  void numbers(int64_t n, int64_t c, const Sums<3>& sums, T* out) const {
    const int64_t i = place_of(source.images, n, c);
    const double pixels = static_cast<double>(source.images.pixels), offset = sums.of[1] / pixels;
    const double g_normalized = sums.of[2] - offset * sums.of[0];
    gradients.shift[i] = static_cast<T>(sums.of[0]);
    gradients.scale[i] = static_cast<T>(g_normalized);
    given(n, c, out);
    out[2] = static_cast<T>(offset), out[3] = modulation.scale[i] * modulation.rstd[i];
    out[4] = static_cast<T>(sums.of[0] / pixels), out[5] = static_cast<T>(g_normalized / pixels);
  }

  template <typename Write, typename Place, typename P>
  void write(Write write, const Place& here, const P* k) const {
    const auto value = [&](auto at) {
      const auto u = source.u(at, here);
      const auto normalized = (source.leaky(u, u) - at(k[0])) * at(k[1]) - at(k[2]);
      // What is taken away changes from pixel to pixel: a constant would be rounded the same way at all of them.
      return source.leaky(u, at(k[3]) * (at(here.grad) - (at(k[4]) + normalized * at(k[5]))));
    };
    if constexpr (active)
      write(dx, value, [&](auto at, auto v) { return v * at(here.noise); }, [](auto, auto v) { return v; });
    else
      write(dx, value);
  }

  void finish(int64_t n, int64_t c, const Sums<kAfter>& after) const {
    const int64_t i = place_of(source.images, n, c);
    if constexpr (active) {
      gradients.weight[i] = static_cast<T>(after.of[0]);
      gradients.bias[i] = static_cast<T>(after.of[1]);
    } else {
      gradients.weight[i] = gradients.bias[i] = 0;
    }
  }
};

// w = v + v_weight noise + v_bias, times slope where u <= 0, is what dh is multiplied with. With
// K = m(w g) - m(w) m(g) - m(w hh) m(g hh) and the projections [a] = a - m(a) - hh m(a hh):
//   grad_g = scale rstd [w] + v_scale hh + v_shift
//   grad_scale = rstd pixels K
//   grad_h = -scale rstd^2 (K hh + m(g hh) [w] + m(w hh) [g]) + v_scale rstd [g]
template <typename E_, bool active>
struct DoubleBackward {
  using E = E_;
  using T = accumulator_t<E>;
  using Total = Sums<6>;
  static constexpr bool kMoments = false;
  static constexpr int kGiven = 5, kSums = 6, kNumbers = 15, kAfter = active ? 2 : 0;

  Source<E, active> source;
  Modulation<T> modulation;
  PlaneDirections<T> directions;
  Lines<E> grad_grad, grad_x;
  PlaneGradients<T> gradients;

  void given(int64_t n, int64_t c, T* out) const {
    const int64_t i = place_of(source.images, n, c);
    out[0] = modulation.mean[i], out[1] = modulation.rstd[i];
    out[2] = directions.weight[i], out[3] = directions.bias[i];
    out[4] = 0;  // the mean of hh
  }

  template <typename At, typename Place, typename P>
  auto normalized(const At& at, const Place& here, const P* k) const {
    return (source.h(at, here) - at(k[0])) * at(k[1]) - at(k[4]);
  }

  template <typename At, typename Place, typename P>
  auto w(const At& at, const Place& here, const P* k) const {
    if constexpr (active)
      return source.leaky(source.u(at, here), at(here.v) + at(k[2]) * at(here.noise) + at(k[3]));
    else
      return at(here.v);
  }

  template <typename Run, typename Place, typename P>
  auto sums(Run run, const Place& here, const P* k) const {
    return run([&](auto at) { return at(here.grad); }, [&](auto at) { return w(at, here, k); },
               [&](auto at) { return at(here.grad) * normalized(at, here, k); },
               [&](auto at) { return w(at, here, k) * normalized(at, here, k); },
               [&](auto at) { return w(at, here, k) * at(here.grad); },
               [&](auto at) { return normalized(at, here, k); });
  }

  void numbers(int64_t n, int64_t c, const Sums<6>& sums, T* out) const {
    const int64_t i = place_of(source.images, n, c);
    const double pixels = static_cast<double>(source.images.pixels), offset = sums.of[5] / pixels;
    const double g = sums.of[0] / pixels, w = sums.of[1] / pixels, w_g = sums.of[4] / pixels;
    const double g_normalized = sums.of[2] / pixels - offset * g, w_normalized = sums.of[3] / pixels - offset * w;
    const double scale = modulation.scale[i], rstd = modulation.rstd[i], v_scale = directions.scale[i];
    const double k = w_g - w * g - w_normalized * g_normalized;
    gradients.scale[i] = static_cast<T>(rstd * pixels * k);
    given(n, c, out);
    out[4] = static_cast<T>(offset);
    out[5] = static_cast<T>(w), out[6] = static_cast<T>(w_normalized);
    out[7] = static_cast<T>(g), out[8] = static_cast<T>(g_normalized);
    out[9] = static_cast<T>(scale * rstd), out[10] = static_cast<T>(v_scale), out[11] = directions.shift[i];
    // grad_h = a [w] + b [g] + c hh
    out[12] = static_cast<T>(-scale * rstd * rstd * g_normalized);
    out[13] = static_cast<T>(-scale * rstd * rstd * w_normalized + v_scale * rstd);
    out[14] = static_cast<T>(-scale * rstd * rstd * k);
  }

  template <typename Write, typename Place, typename P>
  void write(Write write, const Place& here, const P* k) const {
    const auto projected_w = [&](auto at) { return w(at, here, k) - (at(k[5]) + normalized(at, here, k) * at(k[6])); };
    write(grad_grad,
          [&](auto at) { return at(k[9]) * projected_w(at) + at(k[10]) * normalized(at, here, k) + at(k[11]); });
    const auto value = [&](auto at) {
      const auto hh = normalized(at, here, k);
      const auto projected_g = at(here.grad) - (at(k[7]) + hh * at(k[8]));
      const auto sum = at(k[12]) * projected_w(at) + at(k[13]) * projected_g + at(k[14]) * hh;
      return source.leaky(source.u(at, here), sum);
    };
    if constexpr (active)
      write(grad_x, value, [&](auto at, auto v) { return v * at(here.noise); }, [](auto, auto v) { return v; });
    else
      write(grad_x, value);
  }

  void finish(int64_t n, int64_t c, const Sums<kAfter>& after) const {
    const int64_t i = place_of(source.images, n, c);
    if constexpr (active) {
      gradients.weight[i] = static_cast<T>(after.of[0]);
      gradients.bias[i] = static_cast<T>(after.of[1]);
    } else {
      gradients.weight[i] = gradients.bias[i] = 0;
    }
  }
};

template <typename T, typename F>
void with_prologue(const Prologue<T>& prologue, F f) {
  prologue.active ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace

template <typename E, typename T>
void adain_forward(Images images, const Prologue<T>& prologue, double eps, Lines<const E> x, const T* scale,
                   const T* shift, Lines<E> y, T* mean, T* rstd, int threads) {
  with_prologue(prologue, [&](auto active) {
    go_over(Forward<E, active.value>{{images, prologue, x}, eps, scale, shift, y, mean, rstd}, threads);
  });
}

template <typename E, typename T>
void adain_statistics(Images images, double eps, Lines<const E> x, T* mean, T* deviation, int threads) {
  go_over(Statistics<E>{{images, {}, x}, eps, mean, deviation}, threads);
}

template <typename E, typename T>
void adain_backward(Images images, const Prologue<T>& prologue, Lines<const E> grad, Lines<const E> x,
                    const Modulation<T>& modulation, Lines<E> dx, const PlaneGradients<T>& gradients, int threads) {
  with_prologue(prologue, [&](auto active) {
    go_over(Backward<E, active.value>{{images, prologue, x, grad}, modulation, dx, gradients}, threads);
  });
}

template <typename E, typename T>
void adain_double_backward(Images images, const Prologue<T>& prologue, Lines<const E> v,
                           const PlaneDirections<T>& directions, Lines<const E> grad, Lines<const E> x,
                           const Modulation<T>& modulation, Lines<E> grad_grad, Lines<E> grad_x,
                           const PlaneGradients<T>& gradients, int threads) {
  with_prologue(prologue, [&](auto active) {
    go_over(
        DoubleBackward<E, active.value>{
            {images, prologue, x, grad, v}, modulation, directions, grad_grad, grad_x, gradients},
        threads);
  });
}

#define GDL_INSTANTIATE(E)                                                                                             \
  template void adain_forward(Images, const Prologue<accumulator_t<E>>&, double, Lines<const E>,                       \
                              const accumulator_t<E>*, const accumulator_t<E>*, Lines<E>, accumulator_t<E>*,           \
                              accumulator_t<E>*, int);                                                                 \
  template void adain_statistics(Images, double, Lines<const E>, accumulator_t<E>*, accumulator_t<E>*, int);           \
  template void adain_backward(Images, const Prologue<accumulator_t<E>>&, Lines<const E>, Lines<const E>,              \
                               const Modulation<accumulator_t<E>>&, Lines<E>, const PlaneGradients<accumulator_t<E>>&, \
                               int);                                                                                   \
  template void adain_double_backward(Images, const Prologue<accumulator_t<E>>&, Lines<const E>,                       \
                                      const PlaneDirections<accumulator_t<E>>&, Lines<const E>, Lines<const E>,        \
                                      const Modulation<accumulator_t<E>>&, Lines<E>, Lines<E>,                         \
                                      const PlaneGradients<accumulator_t<E>>&, int);
GDL_INSTANTIATE(float)
GDL_INSTANTIATE(double)
GDL_INSTANTIATE(float16)
GDL_INSTANTIATE(bfloat16)
#undef GDL_INSTANTIATE

}  // namespace gdl
