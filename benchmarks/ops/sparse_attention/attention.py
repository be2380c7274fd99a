"""PyTorch's ways to compute attention over a pattern."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gdl_kernels import layouts
from gdl_kernels.layouts import Layout

from .patterns import Keep

#: From query, key and value to the output.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def masked(kept: Tensor) -> Attention:
    """Attention as it is written in plain PyTorch: every score computed, then most of them masked."""
    dropped = ~kept

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # [B, H, n, n]
        return scores.masked_fill(dropped, -torch.inf).softmax(-1) @ value

    return attention


def in_chunks(keep: Keep, rows: Tensor | None = None, chunk: int = 128) -> Attention:
    """``masked``, a chunk of queries at a time, over the keys that any of them sees: float64 fits, at any length.

    ``rows`` are the positions of the queries, where these are not as many as the keys. Keys may be shared by a group of
    query heads.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        j = torch.arange(key.shape[2], device=key.device, dtype=torch.int32)
        chunks = []
        for part, i in zip(query.split(chunk, dim=2), (j if rows is None else rows).split(chunk)):
            kept = keep(i[:, None], j[None, :])
            seen = kept.any(0).nonzero().squeeze(1)
            keys, values = (t[:, :, seen].repeat_interleave(group, dim=1) for t in (key, value))
            chunks.append(masked(kept[:, seen])(part, keys, values))
        return torch.cat(chunks, dim=2)

    return attention


def compiled_flex(keep: Keep, layout: Layout, tuned: bool = True) -> Attention:
    """FlexAttention over the blocks of a layout that all heads share; the formula masks the partial ones."""
    # Its CPU template has nothing to tune.
    mode = "max-autotune-no-cudagraphs" if tuned and layout.device.type == "cuda" else None
    compiled = torch.compile(flex_attention, dynamic=False, mode=mode)
    return functools.partial(compiled, block_mask=block_mask(keep, layout))


def block_mask(keep: Keep, layout: Layout) -> BlockMask:
    """What ``create_block_mask`` makes, without its look at every pair, for which 65,536 positions are too many."""
    if layout.rest is not None:  # FlexAttention knows one order, the natural one, which an intersection is in
        everything = layouts.full(layout.n_q, layout.n_k, block_size=layout.block_size).to(layout.device)
        layout = layout & everything
    if layout.heads != 1 or layout.order.numel():
        raise ValueError(f"layout must be in natural order and the same for all heads, got {layout!r}")
    starts = layout.rows.starts.long()
    row = torch.repeat_interleave(torch.arange(layout.q_blocks, device=layout.device), starts.diff())

    def lists(wanted: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the wanted blocks each row has, and their columns: these first, in ascending order."""
        table = torch.zeros(layout.q_blocks, layout.k_blocks, dtype=torch.int32, device=layout.device)
        table[row, layout.rows.blocks.long()] = wanted.int()
        columns = table.argsort(dim=1, descending=True, stable=True).int()
        return table.sum(1, dtype=torch.int32)[None, None], columns[None, None]

    full = layout.rows.masks == -1
    return BlockMask.from_kv_blocks(
        *lists(~full),
        *lists(full),
        BLOCK_SIZE=layout.block_size,
        mask_mod=lambda b, h, i, j: keep(i, j),
        seq_lengths=(layout.n_q, layout.n_k),
    )
