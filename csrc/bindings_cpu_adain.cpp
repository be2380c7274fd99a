#include "bindings_images.h"
#include "cpu/adain.h"
#include "cpu/dispatch.h"

namespace {

using namespace gdl;

using Address = std::uintptr_t;
// (active, noise, stride of its images, weight, bias, slope)
using PrologueArguments = std::tuple<bool, Address, std::int64_t, Address, Address, double>;
// Of the planes, in the order of the structs in cpu/adain.h.
using Three = std::tuple<Address, Address, Address>;
using Four = std::tuple<Address, Address, Address, Address>;

template <typename T>
Prologue<T> prologue_of(const PrologueArguments& arguments) {
  const auto& [active, noise, image, weight, bias, slope] = arguments;
  return {active, pointer<const T>(noise), image, pointer<const T>(weight), pointer<const T>(bias),
          static_cast<T>(slope)};
}

template <typename T>
Modulation<T> modulation_of(const Three& planes) {
  const auto& [scale, mean, rstd] = planes;
  return {pointer<const T>(scale), pointer<const T>(mean), pointer<const T>(rstd)};
}

template <typename Struct, typename T>
Struct planes_of(const Four& planes) {
  const auto& [scale, shift, weight, bias] = planes;
  return {pointer<T>(scale), pointer<T>(shift), pointer<T>(weight), pointer<T>(bias)};
}

void forward(const std::string& dtype, const Shape& shape, bool channels_last, const PrologueArguments& prologue,
             double eps, const Array& x, Address scale, Address shift, const Array& y, Address mean, Address rstd,
             int threads) {
  dispatch(dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    using T = accumulator_t<E>;
    adain_forward<E>(images(shape, channels_last), prologue_of<T>(prologue), eps, lines<const E>(x),
                     pointer<const T>(scale), pointer<const T>(shift), lines<E>(y), pointer<T>(mean), pointer<T>(rstd),
                     threads);
  });
}

void statistics(const std::string& dtype, const Shape& shape, bool channels_last, double eps, const Array& x,
                Address mean, Address deviation, int threads) {
  dispatch(dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    using T = accumulator_t<E>;
    adain_statistics<E>(images(shape, channels_last), eps, lines<const E>(x), pointer<T>(mean), pointer<T>(deviation),
                        threads);
  });
}

void backward(const std::string& dtype, const Shape& shape, bool channels_last, const PrologueArguments& prologue,
              const Array& grad, const Array& x, const Three& modulation, const Array& dx, const Four& gradients,
              int threads) {
  dispatch(dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    using T = accumulator_t<E>;
    adain_backward<E>(images(shape, channels_last), prologue_of<T>(prologue), lines<const E>(grad), lines<const E>(x),
                      modulation_of<T>(modulation), lines<E>(dx), planes_of<PlaneGradients<T>, T>(gradients), threads);
  });
}

void double_backward(const std::string& dtype, const Shape& shape, bool channels_last,
                     const PrologueArguments& prologue, const Array& v, const Four& directions, const Array& grad,
                     const Array& x, const Three& modulation, const Array& grad_grad, const Array& grad_x,
                     const Four& gradients, int threads) {
  dispatch(dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    using T = accumulator_t<E>;
    adain_double_backward<E>(images(shape, channels_last), prologue_of<T>(prologue), lines<const E>(v),
                             planes_of<PlaneDirections<T>, const T>(directions), lines<const E>(grad),
                             lines<const E>(x), modulation_of<T>(modulation), lines<E>(grad_grad), lines<E>(grad_x),
                             planes_of<PlaneGradients<T>, T>(gradients), threads);
  });
}

void noise(std::uint64_t seed, std::int64_t images, std::int64_t pixels, bool wide, Address out, int threads) {
  if (wide)
    draw_noise(seed, images, pixels, pointer<double>(out), threads);
  else
    draw_noise(seed, images, pixels, pointer<float>(out), threads);
}

const Binding binding([](pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def("adain_forward", &forward, without_gil);
  module.def("adain_statistics", &statistics, without_gil);
  module.def("adain_backward", &backward, without_gil);
  module.def("adain_double_backward", &double_backward, without_gil);
  module.def("adain_noise", &noise, without_gil);
});

}  // namespace
