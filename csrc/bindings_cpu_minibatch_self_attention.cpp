#include <deque>
#include <string>

#include "bindings_images.h"
#include "cpu/minibatch_self_attention.h"

namespace {

using namespace gdl;

// What all passes take. To be made and destroyed with the GIL held.
class Call {
 public:
  Call(const Tensor& query, const Tensor& value, double scale, int pool, const std::string& score, int threads)
      : dtype(query.dtype_name()) {
    const bool l2 = score == "l2";
    attention = {query.size(0), query.size(1), value.size(1), query.size(2), query.size(3), pool, scale, l2, threads};
    attention.threads = threads_for(attention.batch * attention.pixels() * attention.keys(), threads);
  }

  // Each in its own memory format.
  Map map(const Tensor& x) {
    ImageReader& reader = readers_.emplace_back(x);
    const Lines<void> lines = reader.lines<void>(x);
    return {lines.data, lines.image, lines.line, reader.images().channels_last};
  }

  void* contiguous(const Tensor& x) { return copies_.contiguous(x).data<void>(); }

  const std::string dtype;
  MapAttention attention{};

 private:
  std::deque<ImageReader> readers_;
  Copies copies_;
};

void forward(const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key, const Tensor& value,
             double scale, int pool, const std::string& score, int threads) {
  Call call(query, value, scale, pool, score, threads);
  const Map query_map = call.map(query), key_map = call.map(key), value_map = call.map(value), out_map = call.map(out);
  const pybind11::gil_scoped_release without_gil;
  minibatch_self_attention_forward(call.dtype, call.attention, query_map, key_map, value_map, out_map,
                                   lse.data<void>());
}

void backward(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value, const Tensor& grad_out,
              const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
              double scale, int pool, const std::string& score, int threads) {
  Call call(query, value, scale, pool, score, threads);
  const Map to_query = call.map(grad_query), to_key = call.map(grad_key), to_value = call.map(grad_value);
  const Map grad_map = call.map(grad_out), query_map = call.map(query), key_map = call.map(key);
  const Map value_map = call.map(value), out_map = call.map(out);
  const void* lse_data = call.contiguous(lse);
  const pybind11::gil_scoped_release without_gil;
  minibatch_self_attention_backward(call.dtype, call.attention, grad_map, query_map, key_map, value_map, out_map,
                                    lse_data, to_query, to_key, to_value);
}

void double_backward(const Tensor& grad_grad_out, const Tensor& grad_query, const Tensor& grad_key,
                     const Tensor& grad_value, const Tensor& grad_grad_query, const Tensor& grad_grad_key,
                     const Tensor& grad_grad_value, const Tensor& grad_out, const Tensor& query, const Tensor& key,
                     const Tensor& value, const Tensor& out, const Tensor& lse, double scale, int pool,
                     const std::string& score, int threads) {
  Call call(query, value, scale, pool, score, threads);
  const Map to_grad_out = call.map(grad_grad_out), to_query = call.map(grad_query), to_key = call.map(grad_key);
  const Map to_value = call.map(grad_value), along_query = call.map(grad_grad_query);
  const Map along_key = call.map(grad_grad_key), along_value = call.map(grad_grad_value);
  const Map grad_map = call.map(grad_out), query_map = call.map(query), key_map = call.map(key);
  const Map value_map = call.map(value), out_map = call.map(out);
  const void* lse_data = call.contiguous(lse);
  const pybind11::gil_scoped_release without_gil;
  minibatch_self_attention_double_backward(call.dtype, call.attention, along_query, along_key, along_value, grad_map,
                                           query_map, key_map, value_map, out_map, lse_data, to_grad_out, to_query,
                                           to_key, to_value);
}

const Binding binding([](pybind11::module_& module) {
  module.def("minibatch_self_attention_forward", &forward);
  module.def("minibatch_self_attention_backward", &backward);
  module.def("minibatch_self_attention_double_backward", &double_backward);
});

}  // namespace
