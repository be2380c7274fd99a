"""What is minimised, and how fast (arXiv 1706.03762, sections 5.3 and 5.4)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float, padding: int) -> Tensor:
    """The mean of ``-(1 - smoothing) log p[target] - smoothing mean_v(log p[v])`` over targets that are no padding.

    Args:
        logits: ``(..., V)``.
        targets: int64 ``(...)``; those that are ``padding`` don't count.
    """
    return F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=padding, label_smoothing=smoothing
    )  # fmt: skip


def warmed_up_rate(step: int, *, width: int, warmup: int) -> float:
    """The learning rate of a step, counted from 1: ``width^-0.5 min(step^-0.5, step warmup^-1.5)``."""
    return width**-0.5 * min(step**-0.5, step * warmup**-1.5)
