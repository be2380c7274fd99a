// Conditional batch norm on the CPU: forward, backward and double backward; docs/conditional_batch_norm.md has the
// maths.
#pragma once

#include <functional>

#include "../images.h"
#include "half.h"

namespace gdl {

// The ranks whose samples make one batch. Between passes a kernel puts numbers of channels into `numbers`, which has
// room for them, and calls `merge` with how many values of a channel there are on this rank. After it they are the
// numbers of all ranks, and it has returned how many values of a channel those have.
struct Ranks {
  double* numbers;
  std::function<double(std::int64_t)> merge;
};

// T: float, double, float16 or bfloat16. Numbers of planes (N, C) and of channels (C) are dense and in what sums are
// kept in: float, in double for double. The results do not depend on the number of threads. Images may be empty.

// y = gain * (x - mean) * rstd + bias. statistics (3, C): mean, rstd = 1 / sqrt(var + eps), unbiased variance. Without
// a mean and a var they are those of the batch, and (2, C) numbers go over the ranks; else the last is var itself.
template <typename T>
void conditional_batch_norm_forward(Images images, Lines<const T> x, const accumulator_t<T>* gain,
                                    const accumulator_t<T>* bias, const accumulator_t<T>* mean,
                                    const accumulator_t<T>* var, double eps, Lines<T> y, accumulator_t<T>* statistics,
                                    const Ranks& ranks, int threads);

// The gradients of x, gain and bias. In training (2, C) numbers go over the ranks.
template <typename T>
void conditional_batch_norm_backward(Images images, Lines<const T> grad, Lines<const T> x, const accumulator_t<T>* gain,
                                     const accumulator_t<T>* statistics, bool training, Lines<T> grad_x,
                                     accumulator_t<T>* grad_gain, accumulator_t<T>* grad_bias, const Ranks& ranks,
                                     int threads);

// The gradients of grad, x and gain, from v, v_gain and v_bias, those of what backward gives. In training (7, C)
// numbers go over the ranks.
template <typename T>
void conditional_batch_norm_double_backward(Images images, Lines<const T> v, const accumulator_t<T>* v_gain,
                                            const accumulator_t<T>* v_bias, Lines<const T> grad, Lines<const T> x,
                                            const accumulator_t<T>* gain, const accumulator_t<T>* statistics,
                                            bool training, Lines<T> of_grad, Lines<T> of_x, accumulator_t<T>* of_gain,
                                            const Ranks& ranks, int threads);

// running[c * stride] moves towards batch[c] by momentum, of the way between them. R: any T; A: float or double.
template <typename R, typename A>
void conditional_batch_norm_move(R* running, std::int64_t stride, const A* batch, std::int64_t channels,
                                 double momentum);

}  // namespace gdl
