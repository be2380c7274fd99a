"""What the machine itself can do, measured in the same run as the contestants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ceiling:
    name: str
    call: Callable[[], Tensor]
    flops: float


def matrix_product(dtype: torch.dtype, device: torch.device) -> Ceiling:
    """torch's own product of two large square matrices."""
    size = 8192 if device.type == "cuda" else 2048  # fills an H200; takes 0.1 s on two CPU cores
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return Ceiling(f"torch.mm {size}³", lambda: left @ right, 2.0 * size**3)
