#include "bindings_images.h"
#include "cuda/check.h"
#include "cuda/pixel_norm.h"

namespace {

using namespace gdl;

void forward(const Tensor& y, const Tensor& x, double eps, std::uintptr_t stream) {
  ImageReader reader(y);
  const Lines<const void> x_lines = reader.lines<const void>(x);
  const Lines<void> y_lines = reader.lines<void>(y);
  const pybind11::gil_scoped_release without_gil;
  check(pixel_norm_forward(y.dtype_name(), reader.images(), static_cast<float>(eps), x_lines, y_lines,
                           reinterpret_cast<cudaStream_t>(stream)),
        "pixel_norm_forward");
}

void backward(const Tensor& dx, const Tensor& grad, const Tensor& x, double eps, std::uintptr_t stream) {
  ImageReader reader(dx);
  const Lines<const void> grad_lines = reader.lines<const void>(grad), x_lines = reader.lines<const void>(x);
  const Lines<void> dx_lines = reader.lines<void>(dx);
  const pybind11::gil_scoped_release without_gil;
  check(pixel_norm_backward(dx.dtype_name(), reader.images(), static_cast<float>(eps), grad_lines, x_lines, dx_lines,
                            reinterpret_cast<cudaStream_t>(stream)),
        "pixel_norm_backward");
}

const Binding binding([](pybind11::module_& module) {
  module.def("pixel_norm_forward", &forward);
  module.def("pixel_norm_backward", &backward);
});

}  // namespace
