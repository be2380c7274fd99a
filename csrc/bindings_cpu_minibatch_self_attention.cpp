#include <tuple>

#include "bindings.h"
#include "cpu/minibatch_self_attention.h"

namespace {

using Address = std::uintptr_t;
// (address, strides of images and lines, whether channels are last)
using Tensor = std::tuple<Address, std::int64_t, std::int64_t, bool>;
// (batch, channels, value channels, height, width, pool, scale, l2, threads)
using Call = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, int, double, bool, int>;

gdl::Map map(const Tensor& tensor) {
  const auto& [address, image, line, last] = tensor;
  return {gdl::pointer<void>(address), image, line, last};
}

gdl::MapAttention attention(const Call& given) {
  const auto& [batch, channels, value_channels, height, width, pool, scale, l2, threads] = given;
  return {batch, channels, value_channels, height, width, pool, scale, l2, threads};
}

void forward(const std::string& dtype, const Call& call, const Tensor& query, const Tensor& key, const Tensor& value,
             const Tensor& out, Address lse) {
  gdl::minibatch_self_attention_forward(dtype, attention(call), map(query), map(key), map(value), map(out),
                                        gdl::pointer<void>(lse));
}

void backward(const std::string& dtype, const Call& call, const Tensor& grad_out, const Tensor& query,
              const Tensor& key, const Tensor& value, const Tensor& out, Address lse, const Tensor& grad_query,
              const Tensor& grad_key, const Tensor& grad_value) {
  gdl::minibatch_self_attention_backward(dtype, attention(call), map(grad_out), map(query), map(key), map(value),
                                         map(out), gdl::pointer<const void>(lse), map(grad_query), map(grad_key),
                                         map(grad_value));
}

void double_backward(const std::string& dtype, const Call& call, const Tensor& grad_grad_query,
                     const Tensor& grad_grad_key, const Tensor& grad_grad_value, const Tensor& grad_out,
                     const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, Address lse,
                     const Tensor& grad_grad_out, const Tensor& grad_query, const Tensor& grad_key,
                     const Tensor& grad_value) {
  gdl::minibatch_self_attention_double_backward(
      dtype, attention(call), map(grad_grad_query), map(grad_grad_key), map(grad_grad_value), map(grad_out), map(query),
      map(key), map(value), map(out), gdl::pointer<const void>(lse), map(grad_grad_out), map(grad_query), map(grad_key),
      map(grad_value));
}

const gdl::Binding binding([](pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def("minibatch_self_attention_forward", &forward, without_gil);
  module.def("minibatch_self_attention_backward", &backward, without_gil);
  module.def("minibatch_self_attention_double_backward", &double_backward, without_gil);
});

}  // namespace
