"""Truncated noise as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._truncated_normal import truncated_normal


class TruncatedNormal(nn.Module):
    """Draws noise by :func:`gdl_kernels.truncated_normal` where the module is: on its device, in its dtype.

    Args:
        *shape: of one sample.
        threshold: positive. It may be changed between draws.

    Shapes: ``noise(count)`` is ``(count, *shape)``.

    Raises:
        ValueError: if ``threshold`` is not positive, at construction or when it is drawn with.
        TypeError: if ``threshold`` is no number.
    """

    _where: Tensor

    def __init__(
        self,
        *shape: int,
        threshold: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.threshold = shape, threshold
        self.register_buffer("_where", truncated_normal(0, threshold, device=device, dtype=dtype), persistent=False)

    def forward(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        return truncated_normal(
            (count, *self.shape),
            self.threshold,
            generator=generator,
            device=self._where.device,
            dtype=self._where.dtype,
        )

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}, threshold={self.threshold}"
