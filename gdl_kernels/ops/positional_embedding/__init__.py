"""Token embeddings with sinusoidal positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._arguments import check_finite, check_floating
from . import op, reference

#: Where float64 no longer counts every position.
MAX_POSITION = 2**53


def positional_embedding(
    tokens: Tensor, weight: Tensor, *, scale: float | None = None, start: int = 0, backend: str | None = None
) -> Tensor:
    """Look up each token's row, scale it and add its position (Transformer, arXiv 1706.03762, sections 3.4 and 3.5).

    ``out[..., n, 2 i] = scale * weight[tokens[..., n], 2 i] + sin((start + n) / 10000^(2 i / D))`` and in columns
    ``2 i + 1`` the cosine of the same. An odd ``D`` ends with a sine.

    Args:
        tokens: int64 or int32 ``(..., N)``, any strides, from 0 to ``V - 1``.
        weight: the table, ``(V, D)``, floating point, any strides.
        scale: default ``sqrt(D)``.
        start: position of the first token: with a cache, how many came before. Positions have no limit of length; the
            kernels are exact to float32's rounding to position 10^11, the reference to 10^8.
        backend: overrides the backend of this call.

    Returns:
        ``(..., N, D)`` in the dtype of ``weight``, contiguous; computed in float32, in float64 for float64, and rounded
        once. Autocast leaves its dtype alone. Differentiable in ``weight`` without limit, under ``torch.compile`` once;
        the gradient is summed in one order, so it is the same at every call.

    Raises:
        ValueError: if ``tokens`` has no dimension, or on the CPU a token is out of range, before anything is written;
            if ``weight`` is not a matrix with a row and a column at least, or on another device; if ``start`` is
            negative or a position beyond 2^53; or if ``scale`` is not finite. On a GPU tokens can't be looked at
            without waiting for it: there the Triton kernels read nothing for a token out of range, its row of the
            output is NaN, and it adds to no gradient; the reference fails as ``F.embedding`` does, by a device assert.
        TypeError: if ``tokens`` is not int64 or int32, ``weight`` not floating point, ``start`` not an integer, or
            ``scale`` not a number.
        RuntimeError: if ``backend`` was given and can't serve the call.
    """
    chosen, scale = _serving(backend, tokens, weight, scale)
    _check_start(start, tokens.shape[-1])
    if chosen != "reference":
        return op.forward(tokens, weight, scale, start, chosen)
    # Compiled code can't branch on what tokens hold; F.embedding then refuses them, in its own words.
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        reference.check_range(tokens, weight.shape[0])
    return reference.positional_embedding(tokens, weight, scale, start)


@op.choices.serving
def _serving(backend: str | None, tokens: Tensor, weight: Tensor, scale: float | None) -> tuple[str, float]:
    """The backend, and the scale."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a tensor, got {type(tokens).__name__}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}")
    if tokens.dim() == 0:
        raise ValueError("tokens must be (..., N), got shape ()")
    check_floating("weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be (V, D) with a row and a column at least, got shape {tuple(weight.shape)}")
    if weight.device != tokens.device:
        raise ValueError(f"weight must be on the device of tokens, {tokens.device}, got {weight.device}")
    if scale is not None:
        check_finite("scale", scale)
    chosen = op.choices.pick(weight.device, backend, tokens, weight)
    return chosen, math.sqrt(weight.shape[1]) if scale is None else scale


def _check_start(start: int, length: int) -> None:
    """With a cache it grows at every call, so it is checked at each: remembered, each would be a kind of its own."""
    if not isinstance(start, (int, torch.SymInt)):
        raise TypeError(f"start must be an integer, got {type(start).__name__}")
    if start < 0 or start + length > MAX_POSITION:
        raise ValueError(f"start must be from 0 to 2^53 less the {length} positions, got {start}")
