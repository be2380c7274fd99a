"""Minibatch standard deviation in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def minibatch_stddev(x: Tensor, group_size: int, num_features: int, eps: float) -> Tensor:
    if x.shape[0] == 0:
        return torch.cat([x, x.new_empty(0, num_features, *x.shape[2:])], 1)
    group = min(group_size, x.shape[0])
    wide = grouped(x.to(torch.promote_types(x.dtype, torch.float32)), group, num_features)
    variance = (wide - wide.mean(0)).square().mean(0)
    statistic = (variance + eps).sqrt().flatten(2).mean(2)  # [N/G, F]
    return torch.cat([x, tiled(statistic, group, x).to(x.dtype)], 1)


def grouped(x: Tensor, group: int, num_features: int) -> Tensor:
    """``[G, N/G, F, C/F, *spatial]``: sample ``g * (N/G) + m`` is member ``g`` of group ``m``."""
    return x.reshape(group, x.shape[0] // group, num_features, x.shape[1] // num_features, *x.shape[2:])


def tiled(statistic: Tensor, group: int, x: Tensor) -> Tensor:
    """``[N/G, F]`` to ``(N, F, *spatial)``: the same for every member of a group and every pixel of ``x``."""
    members = statistic.repeat(group, 1).view(x.shape[0], -1, *[1] * (x.dim() - 2))
    return members.expand(-1, -1, *x.shape[2:])
