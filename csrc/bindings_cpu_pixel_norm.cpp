#include "bindings_images.h"
#include "cpu/dispatch.h"
#include "cpu/pixel_norm.h"

namespace {

using namespace gdl;

void forward(const std::string& dtype, const Shape& shape, bool channels_last, double eps, const Array& x,
             const Array& y, int threads) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    pixel_norm_forward<T>(images(shape, channels_last), eps, lines<const T>(x), lines<T>(y), threads);
  });
}

void backward(const std::string& dtype, const Shape& shape, bool channels_last, double eps, const Array& grad,
              const Array& x, const Array& dx, int threads) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    pixel_norm_backward<T>(images(shape, channels_last), eps, lines<const T>(grad), lines<const T>(x), lines<T>(dx),
                           threads);
  });
}

const Binding binding([](pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def("pixel_norm_forward", &forward, without_gil);
  module.def("pixel_norm_backward", &backward, without_gil);
});

}  // namespace
