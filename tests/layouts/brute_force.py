"""Layouts as their formulas say, as dense masks; and what must hold for every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from gdl_kernels.layouts import BlockLists, Layout


def positions(n_q: int, n_k: int | None = None) -> tuple[Tensor, Tensor]:
    return torch.arange(n_q)[:, None], torch.arange(n_q if n_k is None else n_k)[None, :]


def local(n: int, window: int, causal: bool) -> Tensor:
    i, j = positions(n)
    return (j <= i) & (i - j < window) if causal else (i - j).abs() < window


def strided(n: int, stride: int, causal: bool) -> Tensor:
    i, j = positions(n)
    kept = (i - j) % stride == 0
    return kept & (j <= i) if causal else kept


def fixed(n: int, stride: int, summary: int, head: int, causal: bool, part: str = "merged") -> Tensor:
    i, j = positions(n)
    u = head % (stride // summary)
    run = i // stride == j // stride
    columns = (stride - (u + 1) * summary <= j % stride) & (j % stride < stride - u * summary)
    kept = {"merged": run | columns, "local": run, "summary": columns.expand(n, n)}[part]
    return kept & (j <= i) if causal else kept


def sliding_with_sinks(n: int, window: int, sinks: int) -> Tensor:
    i, j = positions(n)
    return (j <= i) & ((i - j < window) | (j < sinks))


def check(layout: Layout, mask: Tensor) -> None:
    """The layout keeps exactly what the mask keeps, and its lists are as the kernels expect them."""
    torch.testing.assert_close(layout.to_mask(), mask, rtol=0, atol=0)
    heads = mask if mask.dim() == 3 else mask[None]
    assert layout.heads == len(heads)
    assert layout.kept_pairs() == int(mask.sum())
    assert layout.density == int(mask.sum()) / mask.numel()
    assert layout.causal == (not bool(mask.triu(1).any()))
    check_structure(layout)


def check_structure(layout: Layout) -> None:
    size, table = layout.block_size, layout.mask_table
    assert table.shape[1:] == (size, -(-size // 32))
    assert table.dtype == torch.int32
    assert len(set(map(bytes, table.numpy()))) == len(table), "a mask is stored twice"
    assert set(layout.rows.masks.tolist()) - {-1} == set(range(len(table))), "a mask is unused, or missing"

    blocks = blocks_of(layout.rows, layout.heads, layout.q_blocks)
    head, column, row, mask = blocks_of(layout.columns, layout.heads, layout.k_blocks).T
    transposed = torch.stack([head, row, column, mask], 1).tolist()
    assert sorted(blocks.tolist()) == sorted(transposed), "rows and columns disagree"

    # Of the rows that exist, a full block keeps all pairs, a partial one some but not all, none past the last key.
    _, row, column, mask = blocks.T
    bit = torch.arange(size)
    bits = torch.cat([(table[:, :, bit // 32] >> (bit % 32)) & 1, torch.ones(1, size, size, dtype=torch.int32)])[mask]
    exists = row[:, None] * size + bit < layout.n_q  # [kept, b]
    kept, pairs = (bits * exists[:, :, None]).sum((1, 2)), exists.sum(1) * size
    past = (bits * exists[:, :, None] * (column[:, None] * size + bit >= layout.n_k)[:, None]).sum((1, 2))
    assert bool((kept > 0).all()), "a block is empty"
    assert torch.equal(kept == pairs, mask < 0), "a full block is called partial"
    assert not past.any(), "a block keeps a key past the last one"
    if layout.order.numel():
        assert layout.order.dtype == torch.int32
        assert layout.order.shape in ((1, layout.n_q), (layout.heads, layout.n_q))
        assert bool((layout.order.sort(1).values == torch.arange(layout.n_q)).all())


def blocks_of(lists: BlockLists, heads: int, lines: int) -> Tensor:
    """Head, line, block and mask of each kept block, ``(kept, 4)``; checks shapes, dtypes and order on the way."""
    starts, splits, blocks, masks = (lists.starts, lists.splits, lists.blocks, lists.masks)
    assert all(t.dtype == torch.int32 for t in (starts, splits, blocks, masks))
    assert starts.shape == (heads * lines + 1,)
    assert splits.shape == (heads, lines)
    assert blocks.shape == masks.shape == (int(starts[-1]),)
    assert bool((starts[:-1] <= splits.flatten()).all() & (splits.flatten() <= starts[1:]).all())
    line = torch.repeat_interleave(torch.arange(heads * lines), starts.diff())
    partial = torch.arange(len(blocks)) >= splits.flatten()[line]
    assert torch.equal(partial, masks >= 0), "full and partial blocks are mixed"
    place = (line * 2 + partial) * (blocks.max() + 1 if len(blocks) else 1) + blocks
    assert bool((place.diff() > 0).all()), "blocks are not in ascending order"
    return torch.stack([line // lines, line % lines, blocks, masks], 1)
