#include "bindings_cuda_adain.h"

#include <array>

namespace {

using namespace gdl;

using Maybe = std::optional<Tensor>;

// statistics: (2, N, C)
Modulation modulation_of(AdainReader& reader, const Tensor& scale, const Tensor& statistics) {
  const float* const mean = reader.contiguous(statistics).data<const float>();
  return {reader.numbers(scale), mean, mean + scale.numel()};
}

void forward(const Tensor& y, const Tensor& statistics, const Tensor& x, const Tensor& scale, const Tensor& shift,
             const PrologueArguments& prologue, double eps, std::uintptr_t stream) {
  AdainReader reader(y, statistics, stream);
  float* const mean = statistics.data<float>();
  const AdainForward arguments{reader.lines<const void>(x),
                               reader.numbers(scale),
                               reader.numbers(shift),
                               reader.prologue(prologue),
                               static_cast<float>(eps),
                               reader.lines<void>(y),
                               mean,
                               mean + scale.numel()};
  const pybind11::gil_scoped_release without_gil;
  check(adain_forward(reader.dtype(), reader.images(), arguments, reader.scratch(), reader.stream()), "adain_forward");
}

// gradients: of scale, shift, weight and bias
void backward(const Tensor& dx, const std::array<Tensor, 4>& gradients, const Tensor& grad, const Tensor& x,
              const Tensor& scale, const Tensor& statistics, const PrologueArguments& prologue, std::uintptr_t stream) {
  AdainReader reader(dx, statistics, stream);
  const auto& [of_scale, of_shift, of_weight, of_bias] = gradients;
  const AdainBackward arguments{
      reader.lines<const void>(grad),
      reader.lines<const void>(x),
      modulation_of(reader, scale, statistics),
      reader.prologue(prologue),
      reader.lines<void>(dx),
      {reader.written(of_scale), reader.written(of_shift), reader.written(of_weight), reader.written(of_bias)}};
  const pybind11::gil_scoped_release without_gil;
  check(adain_backward(reader.dtype(), reader.images(), arguments, reader.scratch(), reader.stream()),
        "adain_backward");
}

// directions: of scale, shift, weight and bias; gradients: of scale, weight and bias
void double_backward(const Tensor& grad_grad, const Tensor& grad_x, const std::array<Tensor, 3>& gradients,
                     const Tensor& v, const std::array<Maybe, 4>& directions, const Tensor& grad, const Tensor& x,
                     const Tensor& scale, const Tensor& statistics, const PrologueArguments& prologue,
                     std::uintptr_t stream) {
  AdainReader reader(grad_x, statistics, stream);
  const auto& [v_scale, v_shift, v_weight, v_bias] = directions;
  const auto& [of_scale, of_weight, of_bias] = gradients;
  const AdainDoubleBackward arguments{
      reader.lines<const void>(v),
      {reader.numbers(v_scale), reader.numbers(v_shift), reader.numbers(v_weight), reader.numbers(v_bias)},
      reader.lines<const void>(grad),
      reader.lines<const void>(x),
      modulation_of(reader, scale, statistics),
      reader.prologue(prologue),
      reader.lines<void>(grad_grad),
      reader.lines<void>(grad_x),
      {reader.written(of_scale), {}, reader.written(of_weight), reader.written(of_bias)}};
  const pybind11::gil_scoped_release without_gil;
  check(adain_double_backward(reader.dtype(), reader.images(), arguments, reader.scratch(), reader.stream()),
        "adain_double_backward");
}

// of_style, of_content: (2, N, C)
void from_style(const Tensor& y, const Tensor& of_style, const Tensor& of_content, const Tensor& content,
                const Tensor& style, double eps, std::uintptr_t stream) {
  AdainReader reader(y, of_content, stream), style_reader(style, of_style, stream);
  const std::int64_t planes = y.size(0) * y.size(1);
  float *const bias = of_style.data<float>(), *const scale = bias + planes;
  float *const mean = of_content.data<float>(), *const rstd = mean + planes;
  const float rounded_eps = static_cast<float>(eps);
  const AdainStatistics statistics{style_reader.lines<const void>(style), rounded_eps, bias, scale};
  const AdainForward arguments{reader.lines<const void>(content),
                               {scale, NumberType::kFloat},
                               {bias, NumberType::kFloat},
                               {},
                               rounded_eps,
                               reader.lines<void>(y),
                               mean,
                               rstd};
  const pybind11::gil_scoped_release without_gil;
  check(adain_statistics(reader.dtype(), style_reader.images(), statistics, style_reader.scratch(), reader.stream()),
        "adain_statistics");
  check(adain_forward(reader.dtype(), reader.images(), arguments, reader.scratch(), reader.stream()), "adain_forward");
}

// out: (N or 1, 1, *spatial); gradient: float32
void noise_gradient(const Tensor& out, const Tensor& gradient, const Tensor& weight, std::uintptr_t stream) {
  AdainReader reader(gradient, gradient, stream);
  const Lines<const float> lines = reader.lines<const float>(gradient);
  const Numbers<const void> weights = reader.numbers(weight);
  const bool one_for_all = out.size(0) != gradient.size(0);
  const pybind11::gil_scoped_release without_gil;
  check(adain_noise_gradient(reader.images(), lines, weights, AdainReader::written(out), one_for_all, reader.stream()),
        "adain_noise_gradient");
}

const Binding binding([](pybind11::module_& module) {
  module.def("adain_forward", &forward);
  module.def("adain_backward", &backward);
  module.def("adain_double_backward", &double_backward);
  module.def("adain_from_style_forward", &from_style);
  module.def("adain_noise_gradient", &noise_gradient);
});

}  // namespace
