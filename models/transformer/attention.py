"""What attends to what: layouts for any length, and attention from one sequence to another."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from gdl_kernels import layouts, sparse_attention
from gdl_kernels.layouts import Layout

#: The fewest rows that a layout is built with. It is then one of a power of two, and serves all that are shorter.
_SHORTEST = 256


def causal_layout(n: int, device: torch.device) -> Layout:
    """Each position sees itself and those before it, for ``n`` positions or more: found, and built once."""
    return _causal(_rows(n), device)


def full_layout(n_q: int, n_k: int, device: torch.device) -> Layout:
    """Each of ``n_q`` queries, or more, sees all of exactly ``n_k`` keys: found, and built once."""
    return _full(_rows(n_q), n_k, device)


def _rows(n: int) -> int:
    return 1 << (max(n, _SHORTEST) - 1).bit_length()


# What is built while decoding in inference mode has to serve training, too: autograd keeps no inference tensors.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _causal(n: int, device: torch.device) -> Layout:
    return layouts.causal(n).to(device)


@lru_cache(maxsize=512)
@torch.inference_mode(False)
def _full(n_q: int, n_k: int, device: torch.device) -> Layout:
    return layouts.full(n_q, n_k).to(device)


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to all of another: ``out(concat_h(attention(q_h, k_h, v_h)))``.

    ``q = query(x)`` and ``k, v = key_value(memory)``. Keys and values are computed apart: decoding does it once.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, S, width)`` to the keys and the values of each head, both ``(B, heads, S, width / heads)``."""
        heads = self.key_value(memory).unflatten(-1, (2, self.heads, -1))  # [B, S, 2, H, D]
        key, value = heads.permute(2, 0, 3, 1, 4)
        return key, value

    def forward(self, x: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None) -> Tensor:
        """Attend from ``x`` to what :meth:`keys_values` gave.

        Args:
            x: ``(B * K, N, width)``; the K samples of one source follow each other, and share its keys.
            padding: bool ``(B, S)``, True for keys that none may see.

        Returns:
            ``(B * K, N, width)``.
        """
        # All rows of a full layout are alike, so the K samples of a source are just more queries of it.
        rows = x.shape[1] * (len(x) // len(key) if len(key) else 1)
        query = self.query(x).reshape(len(key), rows, x.shape[2]).unflatten(2, (self.heads, -1)).transpose(1, 2)
        layout = full_layout(query.shape[2], key.shape[2], x.device)
        seen = sparse_attention(query, key, value, layout, key_padding_mask=padding)  # [B, H, K N, D]
        return self.out(seen.transpose(1, 2).reshape(x.shape))
