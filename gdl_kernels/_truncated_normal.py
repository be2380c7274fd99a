"""Noise of BigGAN's truncation trick."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Up to this threshold a uniform proposal is accepted more often than a normal one: with P the normal distribution's
#: mass within t, sqrt(2 pi) P / (2 t) of the former and P of the latter. At it both are, at 0.79 of all draws.
_UNIFORM = math.sqrt(math.pi / 2)


def truncated_normal(
    shape: int | Sequence[int],
    threshold: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal numbers, those beyond a threshold drawn again (BigGAN, arXiv 1809.11096, section 3.1).

    The density is ``exp(-x^2 / 2)`` on ``[-threshold, threshold]``, up to a factor, and 0 elsewhere. The smaller the
    threshold, the better and the more alike are a generator's images. Any threshold takes about as long: small ones
    draw from a uniform distribution instead, and keep ``x`` with probability ``exp(-x^2 / 2)``.

    Args:
        shape: of the result.
        threshold: positive; infinity truncates nothing.
        generator: to draw from, on ``device``; default torch's own.
        device, dtype: of the result, as ``torch.randn`` takes them. 16-bit numbers are drawn in float32 and rounded;
            what is beyond the threshold after rounding is drawn again too.

    Raises:
        ValueError: if ``threshold`` is not positive.
        TypeError: if ``threshold`` is no number, or ``dtype`` not floating point.

    On a GPU each round of drawing waits for it: rounds go on until every number is within the threshold, about ten for
    a million numbers.
    """
    if not isinstance(threshold, (int, float)) or isinstance(threshold, bool):
        raise TypeError(f"threshold must be a number, got {type(threshold).__name__}")
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    if dtype is None:
        dtype = torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    drawn = torch.empty(size, device=device, dtype=dtype).flatten()
    again = torch.arange(drawn.numel(), device=drawn.device)
    while again.numel():
        proposal, accepted = _propose(again.numel(), threshold, generator, drawn.device, dtype)
        drawn[again] = proposal
        again = again[~accepted]
    return drawn.view(size)


def _propose(
    count: int, threshold: float, generator: torch.Generator | None, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Numbers, and which of them are to be kept."""
    wide = torch.promote_types(dtype, torch.float32)
    if threshold > _UNIFORM:
        proposal = torch.randn(count, generator=generator, device=device, dtype=wide)
        accepted = torch.ones((), dtype=torch.bool, device=device)
    else:
        proposal = threshold * (2 * torch.rand(count, generator=generator, device=device, dtype=wide) - 1)
        chance = torch.rand(count, generator=generator, device=device, dtype=wide)
        accepted = chance < torch.exp(-0.5 * proposal.square())
    rounded = proposal.to(dtype)
    # In float64: in another dtype the threshold itself would be rounded, perhaps up.
    return rounded, accepted & (rounded.double().abs() <= threshold)
