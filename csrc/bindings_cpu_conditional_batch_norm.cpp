#include <optional>
#include <vector>

#include "bindings_images.h"
#include "cpu/conditional_batch_norm.h"
#include "cpu/dispatch.h"

namespace {

using namespace gdl;

using Address = std::uintptr_t;
// (address, stride from image to image)
using Numbers = std::pair<Address, std::int64_t>;
using Weighted = std::pair<Array, Numbers>;

template <typename A>
Planes<A> planes(const Numbers& numbers) {
  return {pointer<const A>(numbers.first), numbers.second};
}

template <typename T>
Term<T> term(const Weighted& given) {
  return {lines<const T>(given.first), planes<accumulator_t<T>>(given.second)};
}

void moments(const std::string& dtype, const Shape& shape, bool channels_last, const Array& x, Address mean,
             Address squares, int threads) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    conditional_batch_norm_moments<T>(images(shape, channels_last), lines<const T>(x), pointer<double>(mean),
                                      pointer<double>(squares), threads);
  });
}

void sums(const std::string& dtype, const Shape& shape, bool channels_last, const std::optional<Array>& v,
          const Array& grad, const Array& x, Address mean, Address out, int threads) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulator_t<T>;
    const Lines<const T> v_lines = v ? lines<const T>(*v) : Lines<const T>{};
    conditional_batch_norm_sums<T>(images(shape, channels_last), v ? &v_lines : nullptr, lines<const T>(grad),
                                   lines<const T>(x), pointer<const A>(mean), pointer<A>(out), threads);
  });
}

void combine(const std::string& dtype, const Shape& shape, bool channels_last, const std::vector<Weighted>& others,
             const std::optional<Weighted>& x, Address mean, const Numbers& offset, const Array& out, int threads) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulator_t<T>;
    std::vector<Term<T>> terms;
    for (const Weighted& other : others) terms.push_back(term<T>(other));
    const Term<T> x_term = x ? term<T>(*x) : Term<T>{};
    conditional_batch_norm_combine<T>(images(shape, channels_last), terms.data(), static_cast<int>(terms.size()),
                                      x ? &x_term : nullptr, pointer<const A>(mean), planes<A>(offset), lines<T>(out),
                                      threads);
  });
}

const Binding binding([](pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def("conditional_batch_norm_moments", &moments, without_gil);
  module.def("conditional_batch_norm_sums", &sums, without_gil);
  module.def("conditional_batch_norm_combine", &combine, without_gil);
});

}  // namespace
