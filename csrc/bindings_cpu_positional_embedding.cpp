#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/positional_embedding.h"

namespace {

using namespace gdl;

// Both say whether all tokens are within the table; where not, they have written nothing.

bool forward(const std::string& dtype, std::uintptr_t ids, std::int64_t count, std::int64_t length,
             std::uintptr_t weight, std::int64_t stride, std::int64_t rows, std::int64_t columns, double scale,
             std::int64_t start, std::uintptr_t steps, std::uintptr_t out, int threads) {
  const Tokens tokens{pointer<const std::int64_t>(ids), count, length};
  if (!tokens.within(rows)) return false;
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    positional_embedding_forward<T>(tokens, {rows, columns, scale}, {pointer<const T>(weight), stride}, start,
                                    pointer<const std::uint64_t>(steps), pointer<T>(out), threads);
  });
  return true;
}

bool backward(const std::string& dtype, std::uintptr_t ids, std::int64_t count, std::uintptr_t grad,
              std::int64_t stride, std::int64_t rows, std::int64_t columns, double scale, std::uintptr_t grad_weight,
              int threads) {
  const Tokens tokens{pointer<const std::int64_t>(ids), count, count};
  if (!tokens.within(rows)) return false;
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    positional_embedding_backward<T>(tokens, {rows, columns, scale}, {pointer<const T>(grad), stride},
                                     pointer<T>(grad_weight), threads);
  });
  return true;
}

const Binding binding([](pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def("positional_embedding_forward", &forward, without_gil);
  module.def("positional_embedding_backward", &backward, without_gil);
});

}  // namespace
