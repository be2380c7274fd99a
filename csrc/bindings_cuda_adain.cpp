#include <pybind11/functional.h>

#include "bindings_cuda_images.h"
#include "cuda/adain.h"
#include "cuda/check.h"

namespace {

using namespace gdl;

using Address = std::uintptr_t;
// (active, noise, stride of its images, weight, bias, slope)
using PrologueArguments = std::tuple<bool, Address, std::int64_t, Address, Address, double>;
// Of the planes, in the order of the structs in cuda/adain.h.
using Three = std::tuple<Address, Address, Address>;
using Four = std::tuple<Address, Address, Address, Address>;
// Called with a number of floats, gives the address of memory on the GPU.
using Allocate = std::function<Address(std::int64_t)>;

Prologue prologue_of(const PrologueArguments& arguments) {
  const auto& [active, noise, image, weight, bias, slope] = arguments;
  return {active,
          pointer<const float>(noise),
          image,
          pointer<const float>(weight),
          pointer<const float>(bias),
          static_cast<float>(slope)};
}

Modulation modulation_of(const Three& planes) {
  const auto& [scale, mean, rstd] = planes;
  return {pointer<const float>(scale), pointer<const float>(mean), pointer<const float>(rstd)};
}

template <typename Struct, typename Float>
Struct planes_of(const Four& planes) {
  const auto& [scale, shift, weight, bias] = planes;
  return {pointer<Float>(scale), pointer<Float>(shift), pointer<Float>(weight), pointer<Float>(bias)};
}

Scratch scratch_of(const Allocate& allocate) {
  return [&allocate](std::int64_t floats) { return pointer<float>(allocate(floats)); };
}

void forward(const std::string& dtype, const Shape& shape, bool channels_last, const PrologueArguments& prologue,
             double eps, const Array& x, Address scale, Address shift, const Array& y, Address mean, Address rstd,
             const Allocate& allocate, Address stream) {
  const AdainForward arguments{lines<const void>(x),  pointer<const float>(scale), pointer<const float>(shift),
                               prologue_of(prologue), static_cast<float>(eps),     lines<void>(y),
                               pointer<float>(mean),  pointer<float>(rstd)};
  check(
      adain_forward(dtype, images(shape, channels_last), arguments, scratch_of(allocate), pointer<CUstream_st>(stream)),
      "adain_forward");
}

void statistics(const std::string& dtype, const Shape& shape, bool channels_last, double eps, const Array& x,
                Address mean, Address deviation, const Allocate& allocate, Address stream) {
  const AdainStatistics arguments{lines<const void>(x), static_cast<float>(eps), pointer<float>(mean),
                                  pointer<float>(deviation)};
  check(adain_statistics(dtype, images(shape, channels_last), arguments, scratch_of(allocate),
                         pointer<CUstream_st>(stream)),
        "adain_statistics");
}

void backward(const std::string& dtype, const Shape& shape, bool channels_last, const PrologueArguments& prologue,
              const Array& grad, const Array& x, const Three& modulation, const Array& dx, const Four& gradients,
              const Allocate& allocate, Address stream) {
  const AdainBackward arguments{lines<const void>(grad),   lines<const void>(x),
                                modulation_of(modulation), prologue_of(prologue),
                                lines<void>(dx),           planes_of<PlaneGradients, float>(gradients)};
  check(adain_backward(dtype, images(shape, channels_last), arguments, scratch_of(allocate),
                       pointer<CUstream_st>(stream)),
        "adain_backward");
}

void double_backward(const std::string& dtype, const Shape& shape, bool channels_last,
                     const PrologueArguments& prologue, const Array& v, const Four& directions, const Array& grad,
                     const Array& x, const Three& modulation, const Array& grad_grad, const Array& grad_x,
                     const Four& gradients, const Allocate& allocate, Address stream) {
  const AdainDoubleBackward arguments{lines<const void>(v),
                                      planes_of<PlaneDirections, const float>(directions),
                                      lines<const void>(grad),
                                      lines<const void>(x),
                                      modulation_of(modulation),
                                      prologue_of(prologue),
                                      lines<void>(grad_grad),
                                      lines<void>(grad_x),
                                      planes_of<PlaneGradients, float>(gradients)};
  check(adain_double_backward(dtype, images(shape, channels_last), arguments, scratch_of(allocate),
                              pointer<CUstream_st>(stream)),
        "adain_double_backward");
}

void noise(Address seed, std::int64_t images, std::int64_t pixels, Address out, Address stream) {
  check(
      draw_noise(pointer<const std::int64_t>(seed), images, pixels, pointer<float>(out), pointer<CUstream_st>(stream)),
      "adain_noise");
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
