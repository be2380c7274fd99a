"""Block-sparse attention in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    key_padding_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Masked softmax attention.

    ``mask`` is bool, ``(heads or 1, Nq, Nk)``, True where a pair is kept; the rest as in the public function.
    """
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    mask = mask[None]  # [1, H, Nq, Nk]
    if key_padding_mask is not None:
        mask = mask & ~key_padding_mask[:, None, None, :]
    empty = ~mask.any(-1, keepdim=True)
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    # An empty row stays as it is until its end, or its -inf would make NaN of its softmax and of every derivative.
    scores = scores.masked_fill(~(mask | empty), -torch.inf)  # [B, H, Nq, Nk]
    weights = scores.softmax(-1).masked_fill(empty, 0)
    out = weights.to(value.dtype) @ value
    return out, scores.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf) if return_lse else None
