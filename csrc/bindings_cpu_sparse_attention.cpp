#include <array>
#include <tuple>

#include "bindings.h"
#include "cpu/sparse_attention.h"

namespace {

using Address = std::uintptr_t;
// (address, strides of batch, head, position, feature)
using Tensor = std::tuple<Address, std::array<std::int64_t, 4>>;

gdl::Strided strided(const Tensor& tensor) {
  const auto& [address, s] = tensor;
  return {gdl::pointer<void>(address), s[0], s[1], s[2], s[3]};
}

// (sizes, layout, padding, scale, dropout_p, seed, threads)
using Call =
    std::tuple<std::array<std::int64_t, 13>, std::array<Address, 13>, Address, double, double, std::uint64_t, int>;

// sizes: batch, heads, kv_heads, n_q, n_k, head_dim, value_dim, layout_n_q, layout_n_k, layout_heads, block_size,
// order_heads, query_start. layout: the addresses of Layout.tensors().
gdl::Attention attention(const Call& given) {
  const auto& [sizes, layout, padding, scale, dropout_p, seed, threads] = given;
  const auto at = [&, &layout = layout](int i) { return gdl::pointer<const std::int32_t>(layout[i]); };
  gdl::Attention call{};
  std::tie(call.batch, call.heads, call.kv_heads, call.n_q, call.n_k, call.head_dim, call.value_dim, call.layout_n_q,
           call.layout_n_k, call.layout_heads, call.block_size, call.order_heads, call.query_start) =
      std::tuple_cat(sizes);
  call.rows = {at(0), at(1), at(2), at(3)};
  call.columns = {at(5), at(6), at(7), at(8)};
  call.mask_table = at(10);
  call.order = call.order_heads == 0 ? nullptr : at(11);
  call.places = call.order_heads == 0 ? nullptr : at(12);
  call.key_padding_mask = gdl::pointer<const bool>(padding);
  call.scale = scale;
  call.dropout_p = dropout_p;
  call.seed = seed;
  call.threads = threads;
  return call;
}

const gdl::Binding binding([](pybind11::module_& module) {
  module.def("sparse_attention_forward", [](const std::string& dtype, const Call& call, const Tensor& query,
                                            const Tensor& key, const Tensor& value, const Tensor& out, Address lse) {
    const pybind11::gil_scoped_release release;
    gdl::sparse_attention_forward(dtype, attention(call), strided(query), strided(key), strided(value), strided(out),
                                  gdl::pointer<void>(lse));
  });
  module.def("sparse_attention_backward",
             [](const std::string& dtype, const Call& call, const Tensor& grad_out, Address grad_lse,
                const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, Address lse,
                const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value) {
               const pybind11::gil_scoped_release release;
               gdl::sparse_attention_backward(dtype, attention(call), strided(grad_out),
                                              gdl::pointer<const void>(grad_lse), strided(query), strided(key),
                                              strided(value), strided(out), gdl::pointer<const void>(lse),
                                              strided(grad_query), strided(grad_key), strided(grad_value));
             });
  module.def("sparse_attention_double_backward",
             [](const std::string& dtype, const Call& call, const Tensor& grad_grad_query, const Tensor& grad_grad_key,
                const Tensor& grad_grad_value, const Tensor& grad_out, Address grad_lse, const Tensor& query,
                const Tensor& key, const Tensor& value, const Tensor& out, Address lse, const Tensor& grad_grad_out,
                Address grad_grad_lse, const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value) {
               const pybind11::gil_scoped_release release;
               gdl::sparse_attention_double_backward(
                   dtype, attention(call), strided(grad_grad_query), strided(grad_grad_key), strided(grad_grad_value),
                   strided(grad_out), gdl::pointer<const void>(grad_lse), strided(query), strided(key), strided(value),
                   strided(out), gdl::pointer<const void>(lse), strided(grad_grad_out),
                   gdl::pointer<void>(grad_grad_lse), strided(grad_query), strided(grad_key), strided(grad_value));
             });
});

}  // namespace
