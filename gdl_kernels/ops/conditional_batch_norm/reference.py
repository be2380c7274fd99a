"""Conditional batch norm in plain PyTorch: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._arguments import sum_dtype
from .ranks import differentiable_sum


def conditional_batch_norm(
    x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    """The output, and ``(3, C)``: mean, 1 / sqrt(var + eps), unbiased variance.

    Without a mean and a variance it takes those of the batch, over all ranks of a group.
    """
    wide = x.to(sum_dtype(x))
    per_channel, per_plane = [1, -1, *[1] * (x.dim() - 2)], [*x.shape[:2], *[1] * (x.dim() - 2)]
    if mean is None or var is None:
        each = [0, *range(2, x.dim())]
        here = wide.new_full((), x.shape[0] * math.prod(x.shape[2:]), dtype=torch.float64)
        count = differentiable_sum(here, group).clamp(min=1).to(wide.dtype)
        mean = differentiable_sum(wide.sum(each), group) / count
        squares = differentiable_sum((wide - mean.view(per_channel)).square().sum(each), group)
        var, unbiased_var = squares / count, squares / (count - 1).clamp(min=1)
    else:
        mean, var = mean.to(wide.dtype), var.to(wide.dtype)
        unbiased_var = var
    rstd = (var + eps).rsqrt()
    scale = gain.to(wide.dtype) * rstd
    y = (wide - mean.view(per_channel)) * scale.view(per_plane) + bias.to(wide.dtype).view(per_plane)
    return y.to(x.dtype), torch.stack([mean, rstd, unbiased_var])
