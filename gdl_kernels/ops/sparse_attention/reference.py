"""Block-sparse attention in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention.

    ``mask`` is bool, ``(heads or 1, Nq, Nk)``, True where a pair is kept; the rest as in the public function.
    """
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    mask = mask[None]  # [1, H, Nq, Nk]
    if key_padding_mask is not None:
        mask = mask & ~key_padding_mask[:, None, None, :]
    accumulate = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(-1, -2)).to(accumulate) * scale  # [B, H, Nq, Nk]
    scores = scores.masked_fill(~mask, -torch.inf)
    # A row that keeps nothing has lse -inf; 0 stands in for it, or -inf - -inf would make the row NaN.
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return weights.to(value.dtype) @ value, lse
