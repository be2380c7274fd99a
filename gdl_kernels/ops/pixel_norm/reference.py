"""Pixel norm in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_norm(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(1, keepdim=True) + eps).rsqrt()).to(x.dtype)
