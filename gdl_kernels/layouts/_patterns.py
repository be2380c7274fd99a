"""The named patterns."""

from __future__ import annotations

import torch
from torch import Tensor

from ._layout import BlockLists, Layout


def from_mask(mask: Tensor, *, block_size: int = 64) -> Layout:
    """A layout that keeps what a boolean mask keeps.

    Args:
        mask: bool, ``(n_q, n_k)`` for all heads or ``(heads, n_q, n_k)``.
    """
    if mask.dim() == 2:
        mask = mask[None]
    heads, n_q, n_k = mask.shape
    q_blocks, k_blocks = -(-n_q // block_size), -(-n_k // block_size)
    padded = torch.ones(heads, q_blocks * block_size, k_blocks * block_size, dtype=torch.bool)
    padded[:, :, n_k:] = False
    padded[:, :n_q, :n_k] = mask
    tiles = padded.view(heads, q_blocks, block_size, k_blocks, block_size).transpose(2, 3)  # [H, R, C, b, b]
    inside = torch.arange(q_blocks * block_size).view(1, q_blocks, 1, block_size, 1) < n_q
    kept = (tiles & inside).any(-1).any(-1)
    full = tiles.all(-1).all(-1) & kept
    head, row, column = (kept & ~full).nonzero(as_tuple=True)
    words = -(-block_size // 32)
    bits = torch.zeros(len(head), block_size, words * 32, dtype=torch.int64)
    bits[:, :, :block_size] = tiles[head, row, column].long()
    packed = (bits.view(-1, block_size, words, 32) << torch.arange(32)).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    table, which = torch.unique(packed.flatten(1), dim=0, return_inverse=True)
    index = torch.full(kept.shape, -1, dtype=torch.int32)
    index[head, row, column] = which.to(torch.int32)

    def lists(kept: Tensor, index: Tensor) -> BlockLists:
        heads, lines, _ = kept.shape
        h, line, block = kept.nonzero(as_tuple=True)
        mask = index[h, line, block]
        place = torch.argsort((h * lines + line) * 2 + (mask >= 0), stable=True)
        counts = kept.sum(-1).flatten()
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        whole = (kept & (index < 0)).sum(-1)
        splits = starts[:-1].view(heads, lines) + whole
        return BlockLists(starts, splits.to(torch.int32), block[place].to(torch.int32), mask[place])

    causal = not bool(mask.triu(1).any())
    return Layout(
        n_q, n_k, block_size, heads, causal,
        lists(kept, index), lists(kept.transpose(1, 2), index.transpose(1, 2)),
        table.view(-1, block_size, words), torch.empty(0, 0, dtype=torch.int32),
    )  # fmt: skip
