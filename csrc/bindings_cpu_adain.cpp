#include <array>
#include <tuple>

#include "bindings_images.h"
#include "cpu/adain.h"
#include "cpu/buffer.h"
#include "cpu/dispatch.h"

namespace {

using namespace gdl;

// (noise, seed, weight, bias, slope)
using PrologueArguments =
    std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, double>;

// What happens to x before its statistics are taken. Keeps the noise that it draws, for which it lets go of the GIL.
template <typename T>
class PrologueReader {
 public:
  PrologueReader(ImageReader& reader, const PrologueArguments& arguments, int threads) {
    const auto& [noise, seed, weight, bias, slope] = arguments;
    const Images& images = reader.images();
    const bool active = noise || seed || bias || slope != 1;
    const std::int64_t image = noise && noise->size(0) == 1 ? 0 : images.pixels;
    prologue_ = {active,
                 reader.numbers<const T>(noise),
                 image,
                 reader.numbers<const T>(weight),
                 reader.numbers<const T>(bias),
                 static_cast<T>(slope)};
    if (!seed) return;
    drawn_ = make_buffer<T>(images.count * images.pixels);
    prologue_.noise = drawn_.get();
    const std::int64_t number = *seed->data<std::int64_t>();
    const pybind11::gil_scoped_release without_gil;
    draw_noise(number, images.count, images.pixels, drawn_.get(), reader.threads(threads));
  }

  const Prologue<T>& operator*() const { return prologue_; }

 private:
  Prologue<T> prologue_;
  Buffer<T> drawn_;
};

// statistics: (2, N, C)
template <typename T>
Modulation<T> modulation_of(ImageReader& reader, const Tensor& scale, const Tensor& statistics) {
  const T* const mean = reader.numbers<const T>(statistics);
  return {reader.numbers<const T>(scale), mean, mean + scale.numel()};
}

// Numbers of every plane, (N, C), for gradients and directions of what is one number a channel, (C).
template <typename T>
class OfPlanes {
 public:
  explicit OfPlanes(const Images& images) : images_(images), data_(make_buffer<T>(images.count * images.channels)) {}

  // The same for all images; zero where there are none.
  OfPlanes(const Images& images, const T* of_channels) : OfPlanes(images) {
    for (std::int64_t n = 0; n < images.count; ++n)
      for (std::int64_t c = 0; c < images.channels; ++c)
        data_[n * images.channels + c] = of_channels == nullptr ? T(0) : of_channels[c];
  }

  T* data() const { return data_.get(); }

  // Sums over images, to an output that is empty where nobody asks for them.
  void sum(const Tensor& out) const {
    if (out.numel() == 0) return;
    for (std::int64_t c = 0; c < images_.channels; ++c) {
      double total = 0;
      for (std::int64_t n = 0; n < images_.count; ++n) total += data_[n * images_.channels + c];
      out.data<T>()[c] = static_cast<T>(total);
    }
  }

 private:
  Images images_;
  Buffer<T> data_;
};

void forward(const Tensor& y, const Tensor& statistics, const Tensor& x, const Tensor& scale, const Tensor& shift,
             const PrologueArguments& prologue, double eps, int threads) {
  ImageReader reader(y);
  dispatch(y.dtype_name(), [&](auto type) {
    using E = typename decltype(type)::type;
    using T = accumulator_t<E>;
    const PrologueReader<T> before(reader, prologue, threads);
    const Lines<const E> x_lines = reader.lines<const E>(x);
    const Lines<E> y_lines = reader.lines<E>(y);
    const T *scales = reader.numbers<const T>(scale), *shifts = reader.numbers<const T>(shift);
    T* const mean = statistics.data<T>();
    const pybind11::gil_scoped_release without_gil;
    adain_forward<E>(reader.images(), *before, eps, x_lines, scales, shifts, y_lines, mean, mean + scale.numel(),
                     reader.threads(threads));
  });
}

// gradients: of scale, shift, weight and bias
void backward(const Tensor& dx, const std::array<Tensor, 4>& gradients, const Tensor& grad, const Tensor& x,
              const Tensor& scale, const Tensor& statistics, const PrologueArguments& prologue, int threads) {
  ImageReader reader(dx);
  dispatch(dx.dtype_name(), [&](auto type) {
    using E = typename decltype(type)::type;
    using T = accumulator_t<E>;
    const PrologueReader<T> before(reader, prologue, threads);
    const Lines<const E> grad_lines = reader.lines<const E>(grad), x_lines = reader.lines<const E>(x);
    const Lines<E> dx_lines = reader.lines<E>(dx);
    const Modulation<T> modulation = modulation_of<T>(reader, scale, statistics);
    const auto& [of_scale, of_shift, of_weight, of_bias] = gradients;
    const OfPlanes<T> weights(reader.images()), biases(reader.images());
    const PlaneGradients<T> planes{of_scale.data<T>(), of_shift.data<T>(), weights.data(), biases.data()};
    const pybind11::gil_scoped_release without_gil;
    adain_backward<E>(reader.images(), *before, grad_lines, x_lines, modulation, dx_lines, planes,
                      reader.threads(threads));
    weights.sum(of_weight);
    biases.sum(of_bias);
  });
}

// directions: of scale, shift, weight and bias; gradients: of scale, weight and bias
void double_backward(const Tensor& grad_grad, const Tensor& grad_x, const std::array<Tensor, 3>& gradients,
                     const Tensor& v, const std::array<std::optional<Tensor>, 4>& directions, const Tensor& grad,
                     const Tensor& x, const Tensor& scale, const Tensor& statistics, const PrologueArguments& prologue,
                     int threads) {
  ImageReader reader(grad_x);
  const Images& images = reader.images();
  dispatch(grad_x.dtype_name(), [&](auto type) {
    using E = typename decltype(type)::type;
    using T = accumulator_t<E>;
    const PrologueReader<T> before(reader, prologue, threads);
    const Lines<const E> v_lines = reader.lines<const E>(v), grad_lines = reader.lines<const E>(grad);
    const Lines<const E> x_lines = reader.lines<const E>(x);
    const Lines<E> grad_grad_lines = reader.lines<E>(grad_grad), grad_x_lines = reader.lines<E>(grad_x);
    const Modulation<T> modulation = modulation_of<T>(reader, scale, statistics);
    const auto& [v_scale, v_shift, v_weight, v_bias] = directions;
    const OfPlanes<T> v_weights(images, reader.numbers<const T>(v_weight));
    const OfPlanes<T> v_biases(images, reader.numbers<const T>(v_bias)), zeros(images, nullptr);
    const auto or_zeros = [&](const std::optional<Tensor>& v) {
      return v ? reader.numbers<const T>(*v) : zeros.data();
    };
    const PlaneDirections<T> given{or_zeros(v_scale), or_zeros(v_shift), v_weights.data(), v_biases.data()};
    const auto& [of_scale, of_weight, of_bias] = gradients;
    const OfPlanes<T> weights(images), biases(images);
    const PlaneGradients<T> planes{of_scale.data<T>(), nullptr, weights.data(), biases.data()};
    const pybind11::gil_scoped_release without_gil;
    adain_double_backward<E>(images, *before, v_lines, given, grad_lines, x_lines, modulation, grad_grad_lines,
                             grad_x_lines, planes, reader.threads(threads));
    weights.sum(of_weight);
    biases.sum(of_bias);
  });
}

const Binding binding([](pybind11::module_& module) {
  module.def("adain_forward", &forward);
  module.def("adain_backward", &backward);
  module.def("adain_double_backward", &double_backward);
});

}  // namespace
