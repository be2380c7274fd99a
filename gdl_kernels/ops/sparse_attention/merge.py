"""Attention over all keys, from attention over parts of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys into attention over all of them, exactly.

    With ``out_p`` and ``lse_p`` of each part ``p``, as ``sparse_attention(..., return_lse=True)`` returns them::

        lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) out_p

    So keys may be shared out among calls or devices, as flash-decoding and ring attention do.

    Args:
        outs: one or more tensors ``(B, H, Nq, Dv)`` of one dtype and device. Rows whose ``lse`` is -inf are finite.
        lses: as many ``(B, H, Nq)``, in the dtype that sums are kept in: float32, for float64 ``outs`` float64.

    Returns:
        ``(out, lse)``, like the parts. A row that no part keeps anything of gives 0, zero gradients and ``lse = -inf``.
        Accumulates in the dtype of ``lses``. Differentiable without limit, through ``lse`` too.

    Raises:
        ValueError: if there are no parts, not as many ``lses`` as ``outs``, or their shapes or devices do not fit.
        TypeError: if one is not a tensor, or of another dtype.
    """
    _check(outs, lses)
    parts = torch.stack(tuple(lses))  # [P, B, H, Nq]
    empty = (parts == -torch.inf).all(0)
    # A row that no part keeps stays finite until its end, or its -inf would make NaN of every derivative.
    finite = parts.masked_fill(empty, 0)
    weights = finite.softmax(0).masked_fill(empty, 0)
    out = weights[0, ..., None] * outs[0]
    for weight, part in zip(weights[1:], outs[1:]):
        out = out + weight[..., None] * part
    return out.to(outs[0].dtype), finite.logsumexp(0).masked_fill(empty, -torch.inf)


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple of tensors, got {type(parts).__name__}")
    if not outs:
        raise ValueError("outs must have at least one part, got none")
    if len(lses) != len(outs):
        raise ValueError(f"lses must be as many as outs, {len(outs)}, got {len(lses)}")
    for name, parts in (("outs", outs), ("lses", lses)):
        for place, part in enumerate(parts):
            if not isinstance(part, Tensor):
                raise TypeError(f"{name}[{place}] must be a tensor, got {type(part).__name__}")
    first = outs[0]
    if first.dim() != 4:
        raise ValueError(f"outs[0] must be (batch, heads, positions, features), got shape {tuple(first.shape)}")
    if not first.is_floating_point():
        raise TypeError(f"outs[0] must be of a floating point dtype, got {first.dtype}")
    lse_dtype = torch.promote_types(first.dtype, torch.float32)
    expected = (("outs", outs, first.shape, first.dtype), ("lses", lses, first.shape[:3], lse_dtype))
    for name, parts, shape, dtype in expected:
        for place, part in enumerate(parts):
            if part.shape != shape:
                raise ValueError(f"{name}[{place}] must be {tuple(shape)}, got shape {tuple(part.shape)}")
            if part.dtype != dtype:
                raise TypeError(f"{name}[{place}] must be {dtype} where outs[0] is {first.dtype}, got {part.dtype}")
            if part.device != first.device:
                raise ValueError(f"{name}[{place}] must be on the device of outs[0], {first.device}, got {part.device}")
