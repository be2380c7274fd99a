"""Block-sparse attention in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._philox import philox


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    key_padding_mask: Tensor | None,
    dropout: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Masked softmax attention.

    ``mask`` is bool, ``(heads or 1, Nq, Nk)``, True where a pair is kept; ``dropout`` is what the softmax is multiplied
    by, ``(B, H, Nq, Nk)``; the rest as in the public function.
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
    if dropout is not None:
        weights = weights * dropout.to(weights.dtype)
    out = weights.to(value.dtype) @ value
    return out, scores.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf) if return_lse else None


def dropout_multiplier(
    seed: Tensor, dropout_p: float, batch: int, heads: int, query_positions: Tensor, n_k: int
) -> Tensor:
    """0 with probability ``dropout_p``, else ``1 / (1 - dropout_p)``: float64 ``(batch, heads, Nq, n_k)``.

    The pair of the query at position ``i`` and the key at ``j`` has the upper 31 bits of word ``i % 4`` of the counters
    ``(j, i // 4, batch * heads + head, 0)``, and is dropped where they are below ``dropout_p * 2**31``. So what is
    dropped hangs on where a pair is, and on nothing else.
    """
    key, query = torch.arange(n_k, device=seed.device), query_positions.long()[:, None]
    head = torch.arange(batch * heads, device=seed.device).view(batch, heads, 1, 1)
    words = torch.stack(philox(seed, (key, query // 4, head, 0)))  # [4, B, H, Nq, Nk]
    word = words.gather(0, (query % 4).expand(1, *words.shape[1:]))[0]
    return (word >> 1 >= int(dropout_p * 2**31)).double() / (1 - dropout_p)
