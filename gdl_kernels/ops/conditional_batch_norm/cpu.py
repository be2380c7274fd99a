"""Launches the C++ kernels, which merge numbers of channels over the ranks of a process group between their passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import _native
from . import ranks

Group = tuple[Tensor, Callable[[int], float]]


def forward(
    out: tuple[Tensor, Tensor], x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None,
    eps: float, group: str, _backend: str,
) -> None:  # fmt: skip
    merging = _merging(ranks.merge_moments, 2, x, group) if group else None
    kernel = _native.cpu_module().conditional_batch_norm_forward
    kernel(*out, x, gain, bias, mean, var, eps, merging, torch.get_num_threads())


def backward(
    out: tuple[Tensor, Tensor, Tensor], grad: Tensor, x: Tensor, gain: Tensor, statistics: Tensor, training: bool,
    _eps: float, group: str, _backend: str,
) -> None:  # fmt: skip
    merging = _merging(ranks.sum_up, 2, x, group) if group else None
    kernel = _native.cpu_module().conditional_batch_norm_backward
    kernel(*out, grad, x, gain, statistics, training, merging, torch.get_num_threads())


def double_backward(
    out: tuple[Tensor, Tensor, Tensor], v: Tensor, v_gain: Tensor, v_bias: Tensor, grad: Tensor, x: Tensor,
    gain: Tensor, statistics: Tensor, training: bool, _eps: float, group: str, _backend: str,
) -> None:  # fmt: skip
    merging = _merging(ranks.sum_up, 7, x, group) if group else None
    kernel = _native.cpu_module().conditional_batch_norm_double_backward
    kernel(*out, v, v_gain, v_bias, grad, x, gain, statistics, training, merging, torch.get_num_threads())


def move(running_mean: Tensor, running_var: Tensor, statistics: Tensor, momentum: float) -> None:
    """Both running statistics towards those of the batch."""
    # Autograd, which may have saved them, does not see what the kernel writes.
    torch.autograd.graph.increment_version((running_mean, running_var))
    _native.cpu_module().conditional_batch_norm_move(running_mean, running_var, statistics, momentum)


def _merging(over_ranks: Callable[..., Any], count: int, x: Tensor, group: str) -> Group:
    """Memory for ``(count, C)`` numbers of this rank's values, and what makes of them those of all ranks' values."""
    numbers = x.new_empty(count, x.shape[1], dtype=torch.float64)

    def merge(values: int) -> float:
        total, merged = over_ranks(values, numbers, group)
        numbers.copy_(merged)
        return float(total)

    return numbers, merge
