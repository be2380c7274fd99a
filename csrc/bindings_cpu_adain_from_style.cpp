#include "bindings_images.h"
#include "cpu/adain.h"
#include "cpu/dispatch.h"

namespace {

using namespace gdl;

// of_style, of_content: (2, N, C)
void forward(const Tensor& y, const Tensor& of_style, const Tensor& of_content, const Tensor& content,
             const Tensor& style, double eps, int threads) {
  ImageReader reader(y), style_reader(style);
  const std::int64_t planes = y.size(0) * y.size(1);
  dispatch(y.dtype_name(), [&](auto type) {
    using E = typename decltype(type)::type;
    using T = accumulator_t<E>;
    const Lines<const E> content_lines = reader.lines<const E>(content);
    const Lines<const E> style_lines = style_reader.lines<const E>(style);
    const Lines<E> y_lines = reader.lines<E>(y);
    T *const bias = of_style.data<T>(), *const scale = bias + planes;
    T *const mean = of_content.data<T>(), *const rstd = mean + planes;
    const pybind11::gil_scoped_release without_gil;
    adain_statistics<E>(style_reader.images(), eps, style_lines, bias, scale, style_reader.threads(threads));
    adain_forward<E>(reader.images(), Prologue<T>{}, eps, content_lines, scale, bias, y_lines, mean, rstd,
                     reader.threads(threads));
  });
}

const Binding binding([](pybind11::module_& module) { module.def("adain_from_style_forward", &forward); });

}  // namespace
