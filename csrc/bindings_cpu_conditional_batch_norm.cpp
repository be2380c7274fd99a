#include "bindings_images.h"
#include "cpu/buffer.h"
#include "cpu/conditional_batch_norm.h"
#include "cpu/dispatch.h"

namespace {

using namespace gdl;
namespace py = pybind11;

// f(place in memory, place in order) for every number of planes or of channels.
template <typename F>
void for_each_number(const Tensor& x, F f) {
  const int last = x.dim() - 1;
  const std::int64_t rows = last == 0 ? 1 : x.size(0), channels = x.size(last), step = x.stride(last);
  for (std::int64_t n = 0; n < rows; ++n) {
    const std::int64_t place = last == 0 ? 0 : n * x.stride(0), first = n * channels;
    if (step == 1) {
#pragma GCC ivdep
      for (std::int64_t c = 0; c < channels; ++c) f(place + c, first + c);
    } else {
      for (std::int64_t c = 0; c < channels; ++c) f(place + c * step, first + c);
    }
  }
}

// Numbers of planes or of channels as the kernels take them. A tensor that has them so is read and written where it is.
template <typename A>
class Numbers {
 public:
  explicit Numbers(const Tensor& x) : tensor_(x) {
    const bool is_wide = x.dtype().code == dlpack::kFloat && x.dtype().bits == 8 * sizeof(A);
    if (!is_wide || !x.is_contiguous()) own_ = make_buffer<A>(x.numel());
  }

  A* data() const { return own_ ? own_.get() : tensor_.data<A>(); }

  // Before a kernel reads them: what the tensor has.
  void widen() const {
    with_own([](const auto* theirs, A* own) {
      return [=](auto at, auto i) { own[i] = static_cast<A>(to_accumulator(theirs[at])); };
    });
  }

  // After a kernel has written them: the tensor has them.
  void round() const {
    with_own([](auto* theirs, const A* own) {
      using P = std::decay_t<decltype(*theirs)>;
      return [=](auto at, auto i) { theirs[at] = from_accumulator<P>(static_cast<accumulator_t<P>>(own[i])); };
    });
  }

 private:
  template <typename F>
  void with_own(F f) const {
    if (!own_) return;
    dispatch(tensor_.dtype_name(), [&](auto type) {
      for_each_number(tensor_, f(tensor_.data<typename decltype(type)::type>(), own_.get()));
    });
  }

  Tensor tensor_;
  Buffer<A> own_;
};

template <typename A>
Numbers<A> widened(const Tensor& x) {
  Numbers<A> numbers(x);
  numbers.widen();
  return numbers;
}

// Of a process group: memory for its ranks' numbers of channels, and what merges them. None for one process.
using Group = std::optional<std::pair<Tensor, py::function>>;

class Merging {
 public:
  Merging(const Group& group, std::int64_t numbers) {
    if (group) {
      ranks_.numbers = group->first.data<double>();
      ranks_.merge = [&merge = group->second](std::int64_t values) {
        const py::gil_scoped_acquire gil;
        return merge(values).cast<double>();
      };
    } else {
      own_ = make_buffer<double>(numbers);
      ranks_ = {own_.get(), [](std::int64_t values) { return static_cast<double>(values); }};
    }
  }

  const Ranks& ranks() const { return ranks_; }

 private:
  Buffer<double> own_;
  Ranks ranks_;
};

void forward(const Tensor& y, const Tensor& statistics, const Tensor& x, const Tensor& gain, const Tensor& bias,
             const std::optional<Tensor>& mean, const std::optional<Tensor>& var, double eps, const Group& group,
             int threads) {
  ImageReader reader(y);
  dispatch(y.dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulator_t<T>;
    const Lines<const T> x_lines = reader.lines<const T>(x);
    const Lines<T> y_lines = reader.lines<T>(y);
    const Merging merging(group, 2 * reader.images().channels);
    const py::gil_scoped_release without_gil;
    const Numbers<A> wide_gain = widened<A>(gain), wide_bias = widened<A>(bias);
    std::optional<Numbers<A>> wide_mean, wide_var;
    if (mean && var) {
      wide_mean = widened<A>(*mean);
      wide_var = widened<A>(*var);
    }
    conditional_batch_norm_forward<T>(reader.images(), x_lines, wide_gain.data(), wide_bias.data(),
                                      wide_mean ? wide_mean->data() : nullptr, wide_var ? wide_var->data() : nullptr,
                                      eps, y_lines, statistics.data<A>(), merging.ranks(), reader.threads(threads));
  });
}

void backward(const Tensor& grad_x, const Tensor& grad_gain, const Tensor& grad_bias, const Tensor& grad,
              const Tensor& x, const Tensor& gain, const Tensor& statistics, bool training, const Group& group,
              int threads) {
  ImageReader reader(grad_x);
  dispatch(grad_x.dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulator_t<T>;
    const Lines<const T> grad_lines = reader.lines<const T>(grad), x_lines = reader.lines<const T>(x);
    const Lines<T> grad_x_lines = reader.lines<T>(grad_x);
    const Merging merging(group, 2 * reader.images().channels);
    const py::gil_scoped_release without_gil;
    const Numbers<A> of_gain(grad_gain), of_bias(grad_bias);
    conditional_batch_norm_backward<T>(reader.images(), grad_lines, x_lines, widened<A>(gain).data(),
                                       widened<A>(statistics).data(), training, grad_x_lines, of_gain.data(),
                                       of_bias.data(), merging.ranks(), reader.threads(threads));
    of_gain.round();
    of_bias.round();
  });
}

void double_backward(const Tensor& of_grad, const Tensor& of_x, const Tensor& of_gain, const Tensor& v,
                     const Tensor& v_gain, const Tensor& v_bias, const Tensor& grad, const Tensor& x,
                     const Tensor& gain, const Tensor& statistics, bool training, const Group& group, int threads) {
  ImageReader reader(of_x);
  dispatch(of_x.dtype_name(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = accumulator_t<T>;
    const Lines<const T> v_lines = reader.lines<const T>(v), grad_lines = reader.lines<const T>(grad),
                         x_lines = reader.lines<const T>(x);
    const Lines<T> of_grad_lines = reader.lines<T>(of_grad), of_x_lines = reader.lines<T>(of_x);
    const Merging merging(group, 7 * reader.images().channels);
    const py::gil_scoped_release without_gil;
    const Numbers<A> wide_of_gain(of_gain);
    conditional_batch_norm_double_backward<T>(reader.images(), v_lines, widened<A>(v_gain).data(),
                                              widened<A>(v_bias).data(), grad_lines, x_lines, widened<A>(gain).data(),
                                              widened<A>(statistics).data(), training, of_grad_lines, of_x_lines,
                                              wide_of_gain.data(), merging.ranks(), reader.threads(threads));
    wide_of_gain.round();
  });
}

template <typename A>
void move_towards(const Tensor& running, const A* batch, double momentum) {
  dispatch(running.dtype_name(), [&](auto type) {
    using R = typename decltype(type)::type;
    conditional_batch_norm_move<R, A>(running.data<R>(), running.stride(0), batch, running.size(0), momentum);
  });
}

void move(const Tensor& running_mean, const Tensor& running_var, const Tensor& statistics, double momentum) {
  dispatch(statistics.dtype_name(), [&](auto type) {
    using A = accumulator_t<typename decltype(type)::type>;
    const A* const batch = statistics.data<const A>();
    move_towards(running_mean, batch, momentum);
    move_towards(running_var, batch + 2 * statistics.size(1), momentum);
  });
}

const Binding binding([](py::module_& module) {
  module.def("conditional_batch_norm_forward", &forward);
  module.def("conditional_batch_norm_backward", &backward);
  module.def("conditional_batch_norm_double_backward", &double_backward);
  module.def("conditional_batch_norm_move", &move);
});

}  // namespace
