"""Adaptive instance normalisation with another image's statistics, in plain PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor

from ..adain.reference import adain, statistics


def adain_from_style(content: Tensor, style: Tensor, eps: float) -> Tensor:
    mean, deviation = statistics(style, eps)
    return adain(content, deviation, mean, eps)
