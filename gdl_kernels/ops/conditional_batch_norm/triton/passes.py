"""The passes over memory that each op makes, and what lies between them.

A pass is one of the three of ``kernels``. Between two of them ``between`` makes numbers of planes ``(N, C)`` and
of channels ``(C,)``, and with a process group there is one collective. ``xhat = (x - mean) * rstd``; ``m(t)`` is a
channel's mean, over all ranks. On the CPU csrc/cpu/conditional_batch_norm.cpp does the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .... import _images
from .. import ranks
from . import between, kernels


def forward(
    out: tuple[Tensor, Tensor], x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor | None,
    var: Tensor | None, eps: float, group: str, backend: str,
) -> None:  # fmt: skip
    y, statistics = out
    last = _images.channels_last(y)
    lines = _images.lines(x, last)
    given = None
    if mean is None or var is None:
        parts = kernels.moments(lines, last) if x.numel() else statistics.new_empty(4, 0, 1, x.shape[1])
        between.merge(parts, statistics, eps)
        if group:
            _over_ranks(statistics, values_per_channel(x), eps, group)
    elif x.numel():
        given = mean.contiguous(), var.contiguous(), eps
    else:
        var = var.to(statistics.dtype)
        for numbers, value in zip(statistics, (mean, (var + eps).rsqrt(), var)):
            numbers.copy_(value)
    if x.numel():
        kernels.combine(y, [], (lines, gain), bias, statistics, last, given)


def _over_ranks(statistics: Tensor, count: int, eps: float, group: str) -> None:
    """Make of this rank's statistics, over ``count`` values a channel, those of all ranks."""
    mean, _, var = statistics
    total, (mean, squares) = ranks.merge_moments(count, torch.stack([mean, var * max(count - 1, 0)]), group)
    var, unbiased_var = squares / total.clamp(min=1), squares / (total - 1).clamp(min=1)
    statistics.copy_(torch.stack([mean, (var + eps).rsqrt(), unbiased_var]))


def backward(
    out: tuple[Tensor, Tensor, Tensor], grad: Tensor, x: Tensor, gain: Tensor, statistics: Tensor,
    training: bool, eps: float, group: str, backend: str,
) -> None:  # fmt: skip
    """``grad_x = rstd (gain g - m(gain g) - xhat m(gain g xhat))``; in evaluation both means are 0."""
    grad_x, grad_gain, grad_bias = out
    last, count = _images.channels_last(grad_x), values_per_channel(x)
    of_grad, of_x = (_images.lines(t, last) for t in (grad, x))
    parts = kernels.sums(None, of_grad, of_x, statistics, last) if x.numel() else _no_sums(2, x, statistics)
    if not training:
        between.add(parts, statistics, (grad_bias, grad_gain, None))
        if x.numel():
            kernels.combine(grad_x, [(of_grad, gain)], None, None, statistics, last)
        return
    means = statistics.new_empty(2, x.shape[1])
    between.add(parts, statistics, (grad_bias, grad_gain, None), means, gain, count=count)
    if group:
        means = ranks.mean(means, count, group)
    offset, weight = means
    if x.numel():
        kernels.combine(grad_x, [(of_grad, gain)], (of_x, weight), offset, statistics, last)


def double_backward(
    out: tuple[Tensor, Tensor, Tensor], v: Tensor, v_gain: Tensor, v_bias: Tensor, grad: Tensor,
    x: Tensor, gain: Tensor, statistics: Tensor, training: bool, eps: float, group: str, backend: str,
) -> None:  # fmt: skip
    """The gradient of ``<v, grad_x> + <v_gain, grad_gain> + <v_bias, grad_bias>``; docs/conditional_batch_norm.md."""
    of_grad, of_x, of_gain = out
    last, count = _images.channels_last(of_x), values_per_channel(x)
    v_lines, grad_lines, x_lines = (_images.lines(t, last) for t in (v, grad, x))
    parts = kernels.sums(v_lines, grad_lines, x_lines, statistics, last) if x.numel() else _no_sums(5, x, statistics)
    if not training:
        between.add(parts, statistics, (None, None, of_gain))
        if x.numel():
            kernels.combine(of_grad, [(v_lines, gain)], (x_lines, v_gain), v_bias, statistics, last)
            kernels.combine(of_x, [(grad_lines, v_gain)], None, None, statistics, last)
        return
    planes, means = statistics.new_empty(3, *gain.shape), statistics.new_empty(7, x.shape[1])
    between.add(parts, statistics, planes.unbind(), means, gain, v_gain, count)
    if group:
        means = ranks.mean(means, count, group)
    weights = between.weights(of_gain, planes, means, statistics, gain, v_gain, v_bias)
    if x.numel():
        (along, grad_offset), (x_weight, x_offset) = weights
        kernels.combine(of_grad, [(v_lines, gain)], (x_lines, along), grad_offset, statistics, last)
        kernels.combine(
            of_x, [(v_lines, means[1]), (grad_lines, along)], (x_lines, x_weight), x_offset, statistics, last
        )


def _no_sums(count: int, x: Tensor, statistics: Tensor) -> Tensor:
    """What :func:`kernels.sums` gives of no values."""
    return statistics.new_zeros(count, x.shape[0], 1, x.shape[1])


def values_per_channel(x: Tensor) -> int:
    return x.shape[0] * math.prod(x.shape[2:])
