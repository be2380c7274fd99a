#include <array>
#include <vector>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "cpu/spectral_normalize.h"

namespace {

using namespace gdl;

// outer, rows, inner, then addresses: of weight, out, u, v, new_u, new_v; or of grad, weight, grad_weight, u, v.
template <std::size_t count>
using Numbers = std::vector<std::array<std::uintptr_t, count>>;

template <std::size_t count>
SpectralShape shape(const std::array<std::uintptr_t, count>& given) {
  return {static_cast<std::int64_t>(given[0]), static_cast<std::int64_t>(given[1]),
          static_cast<std::int64_t>(given[2])};
}

void forward(const std::string& dtype, const Numbers<9>& given, int iterations, bool v_first, double eps,
             std::uintptr_t sigmas, int threads) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulator_t<T>;
    std::vector<SpectralMatrix<T>> matrices;
    for (const auto& m : given)
      matrices.push_back({shape(m), pointer<const T>(m[3]), pointer<T>(m[4]), pointer<const A>(m[5]),
                          pointer<const A>(m[6]), pointer<A>(m[7]), pointer<A>(m[8])});
    spectral_normalize_forward<T>(matrices, iterations, v_first, eps, pointer<A>(sigmas), threads);
  });
}

void backward(const std::string& dtype, const Numbers<8>& given, std::uintptr_t sigmas, int threads) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulator_t<T>;
    std::vector<SpectralGradient<T>> matrices;
    for (const auto& m : given)
      matrices.push_back({shape(m), pointer<const T>(m[3]), pointer<const T>(m[4]), pointer<T>(m[5]),
                          pointer<const A>(m[6]), pointer<const A>(m[7])});
    spectral_normalize_backward<T>(matrices, pointer<const A>(sigmas), threads);
  });
}

const Binding binding([](pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def("spectral_normalize_forward", &forward, without_gil);
  module.def("spectral_normalize_backward", &backward, without_gil);
});

}  // namespace
