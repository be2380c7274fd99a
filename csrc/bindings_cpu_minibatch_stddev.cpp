#include "bindings_images.h"
#include "cpu/dispatch.h"
#include "cpu/minibatch_stddev.h"

namespace {

using namespace gdl;

// A smaller batch is one group.
Grouping grouping(const Tensor& x, std::int64_t group_size, std::int64_t features) {
  return {std::min(group_size, x.size(0)), features};
}

void forward(const Tensor& y, const Tensor& x, std::int64_t group_size, std::int64_t features, double eps,
             int threads) {
  ImageReader reader(x);  // y has more channels
  dispatch(y.dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Lines<const T> x_lines = reader.lines<const T>(x);
    const Lines<T> y_lines = reader.lines<T>(y);
    const pybind11::gil_scoped_release without_gil;
    minibatch_stddev_forward<T>(reader.images(), grouping(x, group_size, features), eps, x_lines, y_lines,
                                reader.threads(threads));
  });
}

void backward(const Tensor& dx, const Tensor& grad, const Tensor& x, std::int64_t group_size, std::int64_t features,
              double eps, int threads) {
  ImageReader reader(dx);
  dispatch(dx.dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Lines<const T> grad_lines = reader.lines<const T>(grad), x_lines = reader.lines<const T>(x);
    const Lines<T> dx_lines = reader.lines<T>(dx);
    const pybind11::gil_scoped_release without_gil;
    minibatch_stddev_backward<T>(reader.images(), grouping(x, group_size, features), eps, grad_lines, x_lines, dx_lines,
                                 reader.threads(threads));
  });
}

const Binding binding([](pybind11::module_& module) {
  module.def("minibatch_stddev_forward", &forward);
  module.def("minibatch_stddev_backward", &backward);
});

}  // namespace
