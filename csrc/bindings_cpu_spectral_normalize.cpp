#include "cpu/spectral_normalize.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "tensors.h"
#include "threads.h"

namespace {

using namespace gdl;
using std::int64_t;
namespace py = pybind11;

using Tensors = std::vector<Tensor>;

// What the power method has found of a list of weights, as vectors.py lays it out: in one tensor sigmas, then the left
// vectors, then the right ones.
template <typename A>
class Found {
 public:
  Found(const Tensor& vectors, const Tensors& weights) : sigmas(vectors.data<A>()), u_(sigmas + weights.size()), v_(u_) {
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

  // Those of the columns of `like`, in the order in which they lie.
  const A* numbers(const Tensor& v, const Matrix& like) {
    return like.columns.empty() ? numbers(v) : permuted(numbers(v), like);
  }

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

void forward(const Tensors& out, const Tensor& vectors, const Tensors& weights, const Tensors& us, const Tensors& vs,
             int iterations, bool v_first, double eps, int threads) {
  dispatch(weights[0].dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulator_t<T>;
    Found<A> found(vectors, weights);
    Reader<A> reader;
    std::vector<Matrix> read;
    std::vector<SpectralMatrix<T>> matrices;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const Matrix& m = read.emplace_back(reader.matrix(weights[i]));
      matrices.push_back({m.shape, m.tensor.data<const T>(), out[i].data<T>(), reader.numbers(us[i]),
                          reader.numbers(vs[i], m), found.next_u(m.shape), found.next_v(m.shape)});
    }
    const py::gil_scoped_release without_gil;
    spectral_normalize_forward<T>(matrices, iterations, v_first, eps, found.sigmas, threads_for(weights, threads));
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const std::vector<int64_t>& columns = read[i].columns;
      const std::vector<A> there(matrices[i].new_v, matrices[i].new_v + columns.size());
      for (std::size_t j = 0; j < columns.size(); ++j) matrices[i].new_v[columns[j]] = there[j];
    }
  });
}

void backward(const Tensors& grad_weights, const Tensors& grads, const Tensors& weights, const Tensor& vectors,
              int threads) {
  dispatch(weights[0].dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulator_t<T>;
    Found<A> found(vectors, weights);
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

// The first of `count` sigmas that is not finite, if one is.
std::optional<int64_t> first_not_finite(const Tensor& vectors, int64_t count) {
  std::optional<int64_t> first;
  dispatch(vectors.dtype_name(), [&](auto type) {
    const auto* sigmas = vectors.data<const typename decltype(type)::type>();
    for (int64_t i = 0; i < count && !first; ++i)
      if (!std::isfinite(to_accumulator(sigmas[i]))) first = i;
  });
  return first;
}

// What was found takes the place of what was given: rounded to its dtype.
void replace(const Tensors& us, const Tensors& vs, const Tensor& vectors) {
  dispatch(vectors.dtype_name(), [&](auto type) {
    const auto* from = vectors.data<const typename decltype(type)::type>() + us.size();
    for (const Tensors* side : {&us, &vs}) {
      for (const Tensor& vector : *side) {
        dispatch(vector.dtype_name(), [&](auto narrow) {
          using U = typename decltype(narrow)::type;
          U* to = vector.data<U>();
          for (int64_t i = 0; i < vector.size(0); ++i)
            to[i * vector.stride(0)] = from_accumulator<U>(static_cast<accumulator_t<U>>(to_accumulator(from[i])));
        });
        from += vector.size(0);
      }
    }
  });
}

const Binding binding([](py::module_& module) {
  module.def("spectral_normalize_forward", &forward);
  module.def("spectral_normalize_backward", &backward);
  module.def("spectral_normalize_first_not_finite", &first_not_finite);
  module.def("spectral_normalize_replace", &replace);
});

}  // namespace
