#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "cpu/spectral_normalize.h"
#include "tensors.h"
#include "threads.h"

namespace {

using namespace gdl;
using std::int64_t;
namespace py = pybind11;

using Tensors = std::vector<Tensor>;

// What the power method finds of a list of weights, as vectors.py lays it out: sigmas, then the left vectors, then the
// right ones.
template <typename A>
class Found {
 public:
  Found(A* numbers, const Tensors& weights) : sigmas(numbers), u_(sigmas + weights.size()), v_(u_) {
    for (const Tensor& weight : weights) v_ += weight.size(0);
  }

  // Of each weight in turn.
  A* next_u(const SpectralShape& shape) { return std::exchange(u_, u_ + shape.rows); }
  A* next_v(const SpectralShape& shape) { return std::exchange(v_, v_ + shape.columns()); }

  A* const sigmas;

 private:
  A *u_, *v_;
};

// A weight as the kernels read it. Every dense weight, its dimensions in memory in any order, lies as
// [outer][rows][inner]: the dimensions before the rows are `outer`, those after them `inner`.
struct Matrix {
  Tensor tensor;
  SpectralShape shape;
  std::vector<int64_t> columns;  // where in v that of each place in memory is; empty where they lie in their own order
};

// The tensors of a call. Keeps the copies that it makes of them, and is itself to be made and destroyed with the GIL
// held. A: what sums are kept in.
template <typename A>
class Reader {
 public:
  // The weight where it is if it is dense, else a copy with the strides of `torch.empty_like`.
  Matrix matrix(const Tensor& weight) {
    const int64_t rows = weight.size(0), columns = weight.numel(1);
    if (weight.is_contiguous()) return {weight, {1, rows, columns}, {}};
    std::vector<int> order(weight.dim());  // from the outermost in; where one of size 1 comes makes no difference
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return weight.stride(a) > weight.stride(b); });
    if (!is_dense(weight, order)) return matrix(kept(weight.object().attr("clone")()));
    const auto row = std::find(order.begin(), order.end(), 0);
    int64_t inner = 1;
    for (auto d = row + 1; d != order.end(); ++d) inner *= weight.size(*d);
    order.erase(row);
    const bool in_order = std::is_sorted(order.begin(), order.end());
    return {weight, {columns / inner, rows, inner}, in_order ? std::vector<int64_t>() : columns_of(weight, order)};
  }

  // `x`, in memory as the dense `like` is.
  template <typename T>
  const T* laid_out_like(const Tensor& x, const Tensor& like) {
    for (int d = 0; d < x.dim(); ++d) {
      if (x.size(d) == 1 || x.stride(d) == like.stride(d)) continue;
      const py::object empty_like = py::module_::import("torch").attr("empty_like");
      return kept(empty_like(like.object()).attr("copy_")(x.object())).template data<const T>();
    }
    return x.data<const T>();
  }

  // Numbers next to each other.
  const A* numbers(const Tensor& x) { return is_one_of_ours(x) ? x.data<const A>() : copy(x).data(); }

  // The same in the order in which the columns of `like` lie.
  const A* numbers(const Tensor& v, const Matrix& like) {
    return like.columns.empty() ? numbers(v) : permuted(numbers(v), like);
  }

  // A row's numbers, given in their own order, in that in which the columns of `like` lie.
  const A* permuted(const A* v, const Matrix& like) {
    std::vector<A>& there = numbers_.emplace_back();
    there.reserve(like.columns.size());
    for (const int64_t column : like.columns) there.push_back(v[column]);
    return there.data();
  }

 private:
  static bool is_dense(const Tensor& weight, const std::vector<int>& order) {
    int64_t step = 1;
    for (auto d = order.rbegin(); d != order.rend(); ++d) {
      if (weight.size(*d) != 1 && weight.stride(*d) != step) return false;
      step *= weight.size(*d);
    }
    return true;
  }

  static std::vector<int64_t> columns_of(const Tensor& weight, const std::vector<int>& order) {
    std::vector<int64_t> columns{0};
    for (const int d : order) {
      std::vector<int64_t> further;
      further.reserve(columns.size() * weight.size(d));
      for (const int64_t column : columns)
        for (int64_t i = 0; i < weight.size(d); ++i) further.push_back(column + i * weight.numel(d + 1));
      columns.swap(further);
    }
    return columns;
  }

  static bool is_one_of_ours(const Tensor& x) {
    return x.dtype().code == dlpack::kFloat && x.dtype().bits == 8 * sizeof(A) && x.is_contiguous();
  }

  std::vector<A>& copy(const Tensor& x) {
    std::vector<A>& made = numbers_.emplace_back(x.numel());
    dispatch(x.dtype_name(), [&](auto type) {
      const auto* from = x.data<const typename decltype(type)::type>();
      for (int64_t i = 0; i < x.size(0); ++i) made[i] = static_cast<A>(to_accumulator(from[i * x.stride(0)]));
    });
    return made;
  }

  Tensor kept(py::object copy) { return Tensor(kept_.emplace_back(std::move(copy))); }

  std::vector<py::object> kept_;
  std::vector<std::vector<A>> numbers_;  // moving a vector leaves its numbers where they are
};

int threads_for(const Tensors& weights, int available) {
  int64_t elements = 0;
  for (const Tensor& weight : weights) elements += weight.numel();
  return gdl::threads_for(elements, available);
}

// How to look for the largest singular values.
struct Method {
  int iterations;
  bool v_first;
  double eps;
};

// Fills `out` and what is found.
template <typename T, typename A = accumulator_t<T>>
void normalize(const Tensors& out, Found<A> found, const Tensors& weights, const Tensors& us, const Tensors& vs,
               const Method& method, int threads) {
  Reader<A> reader;
  std::vector<Matrix> read;
  std::vector<SpectralMatrix<T>> matrices;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const Matrix& m = read.emplace_back(reader.matrix(weights[i]));
    matrices.push_back({m.shape, m.tensor.data<const T>(), out[i].data<T>(), reader.numbers(us[i]),
                        reader.numbers(vs[i], m), found.next_u(m.shape), found.next_v(m.shape)});
  }
  const py::gil_scoped_release without_gil;
  spectral_normalize_forward<T>(matrices, method.iterations, method.v_first, method.eps, found.sigmas,
                                threads_for(weights, threads));
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const std::vector<int64_t>& columns = read[i].columns;
    const std::vector<A> there(matrices[i].new_v, matrices[i].new_v + columns.size());
    for (std::size_t j = 0; j < columns.size(); ++j) matrices[i].new_v[columns[j]] = there[j];
  }
}

// A place in the list of weights, and the sigma there, which is not finite.
using NotFinite = std::optional<std::pair<int64_t, double>>;

// What is found takes the place of what was given, rounded to its dtype, if `update` and all sigmas are finite.
template <typename A>
NotFinite finish(const A* found, const Tensors& us, const Tensors& vs, bool update) {
  for (std::size_t i = 0; i < us.size(); ++i)
    if (!std::isfinite(found[i])) return std::pair<int64_t, double>(i, found[i]);
  if (!update) return std::nullopt;
  const A* from = found + us.size();
  for (const Tensors* side : {&us, &vs}) {
    for (const Tensor& vector : *side) {
      dispatch(vector.dtype_name(), [&](auto type) {
        using U = typename decltype(type)::type;
        U* to = vector.data<U>();
        for (int64_t i = 0; i < vector.size(0); ++i)
          to[i * vector.stride(0)] = from_accumulator<U>(static_cast<accumulator_t<U>>(from[i]));
      });
      from += vector.size(0);
    }
  }
  return std::nullopt;
}

void forward(const Tensors& out, const Tensor& vectors, const Tensors& weights, const Tensors& us, const Tensors& vs,
             int iterations, bool v_first, double eps, int threads) {
  dispatch(weights[0].dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    auto* const found = vectors.data<accumulator_t<T>>();
    normalize<T>(out, {found, weights}, weights, us, vs, {iterations, v_first, eps}, threads);
  });
}

NotFinite finish_forward(const Tensor& vectors, const Tensors& us, const Tensors& vs, bool update) {
  const bool is_double = vectors.dtype().bits == 64;
  return is_double ? finish(vectors.data<double>(), us, vs, update) : finish(vectors.data<float>(), us, vs, update);
}

// All of it, where nobody will ask for what was found.
NotFinite forward_and_finish(const Tensors& out, const Tensors& weights, const Tensors& us, const Tensors& vs,
                             int iterations, bool v_first, double eps, bool update, int threads) {
  NotFinite not_finite;
  dispatch(weights[0].dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    int64_t length = weights.size();
    for (const Tensors* side : {&us, &vs})
      for (const Tensor& vector : *side) length += vector.numel();
    const Buffer<accumulator_t<T>> found = make_buffer<accumulator_t<T>>(length);
    normalize<T>(out, {found.get(), weights}, weights, us, vs, {iterations, v_first, eps}, threads);
    not_finite = finish(found.get(), us, vs, update);
  });
  return not_finite;
}

void backward(const Tensors& grad_weights, const Tensors& grads, const Tensors& weights, const Tensor& vectors,
              int threads) {
  dispatch(weights[0].dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulator_t<T>;
    Found<A> found(vectors.data<A>(), weights);
    Reader<A> reader;
    std::vector<SpectralGradient<T>> matrices;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const Matrix m = reader.matrix(weights[i]);
      const A *u = found.next_u(m.shape), *v = found.next_v(m.shape);
      matrices.push_back({m.shape, reader.template laid_out_like<T>(grads[i], grad_weights[i]),
                          m.tensor.data<const T>(), grad_weights[i].data<T>(), u,
                          m.columns.empty() ? v : reader.permuted(v, m)});
    }
    const py::gil_scoped_release without_gil;
    spectral_normalize_backward<T>(matrices, found.sigmas, threads_for(weights, threads));
  });
}

const Binding binding([](py::module_& module) {
  module.def("spectral_normalize_forward", &forward);
  module.def("spectral_normalize_finish", &finish_forward);
  module.def("spectral_normalize_forward_and_finish", &forward_and_finish);
  module.def("spectral_normalize_backward", &backward);
});

}  // namespace
