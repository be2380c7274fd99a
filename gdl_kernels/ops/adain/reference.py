"""Adaptive instance normalisation in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._arguments import sum_dtype


def adain(x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``scale`` and ``bias`` are ``(N, C)``."""
    wide = x.to(sum_dtype(x))
    variance, mean = torch.var_mean(wide, tuple(range(2, x.dim())), correction=0, keepdim=True)
    return (planes(scale, wide) * ((wide - mean) * (variance + eps).rsqrt()) + planes(bias, wide)).to(x.dtype)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``sqrt(variance + eps)`` of every plane, ``(N, C)``."""
    variance, mean = torch.var_mean(x.to(sum_dtype(x)), tuple(range(2, x.dim())), correction=0)
    return mean, (variance + eps).sqrt()


def planes(parameter: Tensor, x: Tensor) -> Tensor:
    """``(N, C)`` or ``(C,)``, as something that broadcasts over ``x``."""
    return parameter.to(x.dtype).reshape(*parameter.shape, *[1] * (x.dim() - 2))
