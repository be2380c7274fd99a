#include "bindings_images.h"
#include "cpu/dispatch.h"
#include "cpu/minibatch_stddev.h"

namespace {

using namespace gdl;

void forward(const std::string& dtype, const Shape& shape, bool channels_last, std::int64_t group,
             std::int64_t features, double eps, const Array& x, const Array& y, int threads) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    minibatch_stddev_forward<T>(images(shape, channels_last), {group, features}, eps, lines<const T>(x), lines<T>(y),
                                threads);
  });
}

void backward(const std::string& dtype, const Shape& shape, bool channels_last, std::int64_t group,
              std::int64_t features, double eps, const Array& grad, const Array& x, const Array& dx, int threads) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    minibatch_stddev_backward<T>(images(shape, channels_last), {group, features}, eps, lines<const T>(grad),
                                 lines<const T>(x), lines<T>(dx), threads);
  });
}

const Binding binding([](pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def("minibatch_stddev_forward", &forward, without_gil);
  module.def("minibatch_stddev_backward", &backward, without_gil);
});

}  // namespace
