"""Angles as the kernels count them: in integers, 2^64 to a turn.

What overflows is whole turns, so the angle of position ``p`` is ``p * phase_step`` modulo 2^64, which is exact: the
only error is that of the step, at most 2^-65 of a turn, ``p`` times over. A sine is a cosine a quarter turn behind.
"""

from __future__ import annotations

import functools
from decimal import Decimal, localcontext

import torch
from torch import Tensor

_PI = "3.1415926535897932384626433832795028841971694"


@functools.cache
def phase_steps(width: int, device: torch.device) -> Tensor:
    """From position to position, for the columns ``2 i`` and ``2 i + 1``: int64 ``(ceil(width / 2),)``."""
    with localcontext() as context:
        context.prec = 40
        step, ratio = 2**64 / (2 * Decimal(_PI)), Decimal(10_000) ** (Decimal(-2) / width)
        steps = [round(step * ratio**i) for i in range((width + 1) // 2)]
    return torch.tensor(steps, dtype=torch.int64, device=device)
