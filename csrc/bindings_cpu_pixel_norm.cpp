#include "bindings_images.h"
#include "cpu/dispatch.h"
#include "cpu/pixel_norm.h"

namespace {

using namespace gdl;

void forward(const Tensor& y, const Tensor& x, double eps, int threads) {
  ImageReader reader(y);
  dispatch(y.dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Lines<const T> x_lines = reader.lines<const T>(x);
    const Lines<T> y_lines = reader.lines<T>(y);
    const pybind11::gil_scoped_release without_gil;
    pixel_norm_forward<T>(reader.images(), eps, x_lines, y_lines, reader.threads(threads));
  });
}

void backward(const Tensor& dx, const Tensor& grad, const Tensor& x, double eps, int threads) {
  ImageReader reader(dx);
  dispatch(dx.dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Lines<const T> grad_lines = reader.lines<const T>(grad), x_lines = reader.lines<const T>(x);
    const Lines<T> dx_lines = reader.lines<T>(dx);
    const pybind11::gil_scoped_release without_gil;
    pixel_norm_backward<T>(reader.images(), eps, grad_lines, x_lines, dx_lines, reader.threads(threads));
  });
}

const Binding binding([](pybind11::module_& module) {
  module.def("pixel_norm_forward", &forward);
  module.def("pixel_norm_backward", &backward);
});

}  // namespace
