#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "bindings.h"
#include "cpu/sparse_attention.h"
#include "tensors.h"

namespace {

using namespace gdl;
using OptionalTensor = std::optional<Tensor>;
using Layout = std::array<Tensor, 13>;      // Layout.tensors()
using Sizes = std::array<std::int64_t, 4>;  // Layout.sizes()
// (key_padding_mask, layout, sizes, scale, query_start, dropout_p, seed, threads)
using Given = std::tuple<OptionalTensor, Layout, Sizes, double, std::int64_t, double, std::int64_t, int>;

Strided strided(const Tensor& x) { return {x.data<void>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

// What all passes take. To be made and destroyed with the GIL held.
class Call {
 public:
  Call(const Tensor& query, const Tensor& value, const Given& given) : dtype(query.dtype_name()) {
    const auto& [padding, layout, sizes, scale, query_start, dropout_p, seed, threads] = given;
    const auto& [layout_n_q, layout_n_k, block_size, causal] = sizes;
    const auto at = [&, &layout = layout](int i) { return layout[i].data<const std::int32_t>(); };
    const Tensor &splits = layout[1], &order = layout[11];
    attention.batch = query.size(0), attention.heads = query.size(1), attention.kv_heads = value.size(1);
    attention.n_q = query.size(2), attention.head_dim = query.size(3), attention.value_dim = value.size(3);
    // Of a causal layout no key past the last query is read.
    attention.n_k = causal ? std::min(value.size(2), query_start + query.size(2)) : value.size(2);
    attention.layout_n_q = layout_n_q, attention.layout_n_k = layout_n_k, attention.block_size = block_size;
    attention.layout_heads = splits.size(0), attention.order_heads = order.size(0);
    attention.rows = {at(0), at(1), at(2), at(3)};
    attention.columns = {at(5), at(6), at(7), at(8)};
    attention.mask_table = at(10);
    attention.order = attention.order_heads == 0 ? nullptr : at(11);
    attention.places = attention.order_heads == 0 ? nullptr : at(12);
    attention.key_padding_mask = padding ? of_seen_keys(*padding).data<const bool>() : nullptr;
    attention.query_start = query_start;
    attention.scale = scale;
    attention.dropout_p = dropout_p;
    attention.seed = static_cast<std::uint64_t>(seed);
    attention.threads = threads;
  }

  template <typename T>
  T* contiguous(const Tensor& x) {
    return copies_.contiguous(x).data<T>();
  }

  const void* contiguous(const OptionalTensor& x) { return x ? contiguous<void>(*x) : nullptr; }

  // Of keys or values. Those that are not read have none.
  Strided gradient(const Tensor& grad) const {
    const std::int64_t unseen = grad.size(2) - attention.n_k;
    if (unseen > 0) grad.object().attr("narrow")(2, attention.n_k, unseen).attr("zero_")();
    return strided(grad);
  }

  const std::string dtype;
  Attention attention{};

 private:
  Tensor of_seen_keys(const Tensor& padding) {
    if (padding.size(1) == attention.n_k) return copies_.contiguous(padding);
    return copies_.keep(padding.object().attr("narrow")(1, 0, attention.n_k).attr("contiguous")());
  }

  Copies copies_;
};

void forward(const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key, const Tensor& value,
             const Given& given) {
  const Call call(query, value, given);
  const pybind11::gil_scoped_release without_gil;
  sparse_attention_forward(call.dtype, call.attention, strided(query), strided(key), strided(value), strided(out),
                           lse.data<void>());
}

void backward(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value, const Tensor& grad_out,
              const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
              const Tensor& out, const Tensor& lse, const Given& given) {
  Call call(query, value, given);
  const void *grad_lse_data = call.contiguous(grad_lse), *lse_data = call.contiguous<void>(lse);
  const Strided to_key = call.gradient(grad_key), to_value = call.gradient(grad_value);
  const pybind11::gil_scoped_release without_gil;
  sparse_attention_backward(call.dtype, call.attention, strided(grad_out), grad_lse_data, strided(query), strided(key),
                            strided(value), strided(out), lse_data, strided(grad_query), to_key, to_value);
}

void double_backward(const Tensor& grad_grad_out, const Tensor& grad_grad_lse, const Tensor& grad_query,
                     const Tensor& grad_key, const Tensor& grad_value, const Tensor& grad_grad_query,
                     const Tensor& grad_grad_key, const Tensor& grad_grad_value, const Tensor& grad_out,
                     const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
                     const Tensor& out, const Tensor& lse, const Given& given) {
  Call call(query, value, given);
  const void *grad_lse_data = call.contiguous(grad_lse), *lse_data = call.contiguous<void>(lse);
  const Strided to_key = call.gradient(grad_key), to_value = call.gradient(grad_value);
  const pybind11::gil_scoped_release without_gil;
  sparse_attention_double_backward(call.dtype, call.attention, strided(grad_grad_query), strided(grad_grad_key),
                                   strided(grad_grad_value), strided(grad_out), grad_lse_data, strided(query),
                                   strided(key), strided(value), strided(out), lse_data, strided(grad_grad_out),
                                   grad_grad_lse.data<void>(), strided(grad_query), to_key, to_value);
}

const Binding binding([](pybind11::module_& module) {
  module.def("sparse_attention_forward", &forward);
  module.def("sparse_attention_backward", &backward);
  module.def("sparse_attention_double_backward", &double_backward);
});

}  // namespace
