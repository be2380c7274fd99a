#include <tuple>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/pixel_norm.h"

namespace {

// (address, image stride, line stride), as gdl_kernels/_images.py gives them.
using Array = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;
using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

template <typename T>
gdl::Lines<T> lines(const Array& array) {
  return {gdl::pointer<T>(std::get<0>(array)), std::get<1>(array), std::get<2>(array)};
}

gdl::Images images(const Shape& shape, bool channels_last) {
  return {std::get<0>(shape), std::get<1>(shape), std::get<2>(shape), channels_last};
}

void forward(const std::string& dtype, const Shape& shape, bool channels_last, double eps, const Array& x,
             const Array& y, int threads) {
  gdl::dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    gdl::pixel_norm_forward<T>(images(shape, channels_last), eps, lines<const T>(x), lines<T>(y), threads);
  });
}

void backward(const std::string& dtype, const Shape& shape, bool channels_last, double eps, const Array& grad,
              const Array& x, const Array& dx, int threads) {
  gdl::dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    gdl::pixel_norm_backward<T>(images(shape, channels_last), eps, lines<const T>(grad), lines<const T>(x),
                                lines<T>(dx), threads);
  });
}

const gdl::Binding binding([](pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def("pixel_norm_forward", &forward, without_gil);
  module.def("pixel_norm_backward", &backward, without_gil);
});

}  // namespace
