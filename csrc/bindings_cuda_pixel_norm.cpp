#include "bindings_cuda_images.h"
#include "cuda/check.h"
#include "cuda/pixel_norm.h"

namespace {

using namespace gdl;

void forward(const std::string& dtype, const Shape& shape, bool channels_last, double eps, const Array& x,
             const Array& y, std::uintptr_t stream) {
  check(pixel_norm_forward(dtype, images(shape, channels_last), static_cast<float>(eps), lines<const void>(x),
                           lines<void>(y), pointer<CUstream_st>(stream)),
        "pixel_norm_forward");
}

void backward(const std::string& dtype, const Shape& shape, bool channels_last, double eps, const Array& grad,
              const Array& x, const Array& dx, std::uintptr_t stream) {
  check(pixel_norm_backward(dtype, images(shape, channels_last), static_cast<float>(eps), lines<const void>(grad),
                            lines<const void>(x), lines<void>(dx), pointer<CUstream_st>(stream)),
        "pixel_norm_backward");
}

const Binding binding([](pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def("pixel_norm_forward", &forward, without_gil);
  module.def("pixel_norm_backward", &backward, without_gil);
});

}  // namespace
