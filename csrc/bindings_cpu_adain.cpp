#include <array>
#include <tuple>

#include "bindings_cpu_images.h"
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
    const PlaneGradients<T> planes{gradients[0].data<T>(), gradients[1].data<T>(), gradients[2].data<T>(),
                                   gradients[3].data<T>()};
    const pybind11::gil_scoped_release without_gil;
    adain_backward<E>(reader.images(), *before, grad_lines, x_lines, modulation, dx_lines, planes,
                      reader.threads(threads));
  });
}

// directions: of scale, shift, weight and bias; gradients: of scale, weight and bias
void double_backward(const Tensor& grad_grad, const Tensor& grad_x, const std::array<Tensor, 3>& gradients,
                     const Tensor& v, const std::array<Tensor, 4>& directions, const Tensor& grad, const Tensor& x,
                     const Tensor& scale, const Tensor& statistics, const PrologueArguments& prologue, int threads) {
  ImageReader reader(grad_x);
  dispatch(grad_x.dtype_name(), [&](auto type) {
    using E = typename decltype(type)::type;
    using T = accumulator_t<E>;
    const PrologueReader<T> before(reader, prologue, threads);
    const Lines<const E> v_lines = reader.lines<const E>(v), grad_lines = reader.lines<const E>(grad);
    const Lines<const E> x_lines = reader.lines<const E>(x);
    const Lines<E> grad_grad_lines = reader.lines<E>(grad_grad), grad_x_lines = reader.lines<E>(grad_x);
    const Modulation<T> modulation = modulation_of<T>(reader, scale, statistics);
    const PlaneDirections<T> given{reader.numbers<const T>(directions[0]), reader.numbers<const T>(directions[1]),
                                   reader.numbers<const T>(directions[2]), reader.numbers<const T>(directions[3])};
    const PlaneGradients<T> planes{gradients[0].data<T>(), nullptr, gradients[1].data<T>(), gradients[2].data<T>()};
    const pybind11::gil_scoped_release without_gil;
    adain_double_backward<E>(reader.images(), *before, v_lines, given, grad_lines, x_lines, modulation, grad_grad_lines,
                             grad_x_lines, planes, reader.threads(threads));
  });
}

const Binding binding([](pybind11::module_& module) {
  module.def("adain_forward", &forward);
  module.def("adain_backward", &backward);
  module.def("adain_double_backward", &double_backward);
});

}  // namespace
