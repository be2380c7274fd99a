"""Pixel norm as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.pixel_norm import pixel_norm


class PixelNorm(nn.Module):
    """:func:`gdl_kernels.pixel_norm` as a layer: ``(N, C, *spatial)`` to the same. No parameters."""

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return pixel_norm(x, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
