"""Self-attention of a minibatch in plain PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..._arguments import sum_dtype

SCORES = ("dot", "l2")


def minibatch_self_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, pool: int, score: str) -> Tensor:
    if pool > 1:
        key, value = F.max_pool2d(key, pool), F.max_pool2d(value, pool)
    q, k, v = (t.flatten(2).to(sum_dtype(t)) for t in (query, key, value))  # [B, C, N]
    scores = q.transpose(1, 2) @ k  # [B, Nq, Nk]
    if score == "l2":
        # Without -|q|^2, which is the same for all keys of a query: the softmax doesn't see it.
        scores = 2 * scores - k.square().sum(1, keepdim=True)
    weights = (scale * scores).softmax(-1)
    return (v @ weights.transpose(1, 2)).view(value.shape[:2] + query.shape[2:]).to(value.dtype)
