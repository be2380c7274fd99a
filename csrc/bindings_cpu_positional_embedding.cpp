#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/positional_embedding.h"
#include "tensors.h"
#include "threads.h"

namespace {

using namespace gdl;

// Keeps the copies that it makes. To be made and destroyed with the GIL held.
class Reader {
 public:
  Tokens tokens(const Tensor& x) {
    const Tensor wide = x.dtype().bits == 64 ? x : copies_.keep(x.object().attr("long")());
    return {copies_.contiguous(wide).data<const std::int64_t>(), x.numel(), x.size(x.dim() - 1)};
  }

  // All rows of the last dimension, where they lie if they are contiguous and evenly spaced.
  template <typename T>
  Rows<const T> rows(const Tensor& x) {
    const std::int64_t columns = x.size(x.dim() - 1);
    if (x.is_contiguous()) return {x.data<const T>(), columns};
    Tensor matrix = x.dim() == 2 ? x : copies_.keep(x.object().attr("reshape")(-1, columns));
    if (matrix.stride(1) != 1 && columns != 1) matrix = copies_.contiguous(matrix);
    return {matrix.data<const T>(), matrix.stride(0)};
  }

 private:
  Copies copies_;
};

// Both say whether all tokens are within the table; where not, they have written nothing.

bool forward(const Tensor& out, const Tensor& token_ids, const Tensor& weight, double scale, std::int64_t start,
             const Tensor& steps, int threads) {
  Reader reader;
  const Tokens tokens = reader.tokens(token_ids);
  const Embedding embedding{weight.size(0), weight.size(1), scale};
  bool within = false;
  dispatch(weight.dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Rows<const T> table = reader.rows<T>(weight);
    const pybind11::gil_scoped_release without_gil;
    within = tokens.within(embedding.rows);
    if (within)
      positional_embedding_forward<T>(tokens, embedding, table, start, steps.data<const std::uint64_t>(), out.data<T>(),
                                      threads_for(out.numel(), threads));
  });
  return within;
}

// grad: a row for each token.
bool backward(const Tensor& grad_weight, const Tensor& grad, const Tensor& token_ids, double scale, int threads) {
  Reader reader;
  const Tokens tokens = reader.tokens(token_ids);
  const Embedding embedding{grad_weight.size(0), grad_weight.size(1), scale};
  bool within = false;
  dispatch(grad.dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Rows<const T> rows = reader.rows<T>(grad);
    const pybind11::gil_scoped_release without_gil;
    within = tokens.within(embedding.rows);
    if (within)
      positional_embedding_backward<T>(tokens, embedding, rows, grad_weight.data<T>(),
                                       threads_for(grad.numel() + grad_weight.numel(), threads));
  });
  return within;
}

const Binding binding([](pybind11::module_& module) {
  module.def("positional_embedding_forward", &forward);
  module.def("positional_embedding_backward", &backward);
});

}  // namespace
