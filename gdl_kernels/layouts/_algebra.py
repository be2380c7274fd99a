"""Layouts from layouts: union, intersection, heads side by side, natural order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import _masks
from ._build import BLOCKS_AT_ONCE, Grid, Stripe, assemble, from_masks, ranges, representatives, resolve, spans
from ._layout import Layout

#: Pairs expanded at once when an order is undone; bounds temporary memory to some 100 MB.
_PAIRS_AT_ONCE = 2**20


def union(a: Layout, b: Layout) -> Layout:
    return _combine(a, b, torch.bitwise_or)


def intersection(a: Layout, b: Layout) -> Layout:
    return _combine(a, b, torch.bitwise_and)


def _combine(a: Layout, b: Layout, operation: Callable[[Tensor, Tensor], Tensor]) -> Layout:
    """Combine masks block by block; a block that only one layout keeps meets one that keeps nothing."""
    _check_fit("the left layout", a, "the right one", b)
    if a.heads != b.heads and 1 not in (a.heads, b.heads):
        raise ValueError(f"layouts must have the same heads, or one of them 1, got {a.heads} and {b.heads}")
    order = _common_order(a, b)
    if order is None:
        a, b = natural_order(a), natural_order(b)
    grid = _grid(a, max(a.heads, b.heads))
    table = torch.cat([a.mask_table, b.mask_table, _full_mask(grid), torch.zeros_like(_full_mask(grid))])
    nothing = len(table) - 1

    def stripe(lines: slice) -> Stripe:
        keys, masks = [], []
        for layout, offset in ((a, 0), (b, len(a.mask_table))):
            line, column, mask = _blocks(layout, grid, lines)
            keys.append(line * grid.k_blocks + column)
            masks.append(torch.where(mask < 0, nothing - 1, mask + offset))
        key = torch.unique(torch.cat(keys))
        left, right = torch.full_like(key, nothing), torch.full_like(key, nothing)
        left[torch.searchsorted(key, keys[0])] = masks[0]
        right[torch.searchsorted(key, keys[1])] = masks[1]

        def words(member: Tensor) -> Tensor:
            return operation(table[left[member]], table[right[member]])

        line = key // grid.k_blocks
        return resolve(grid, line, key - line * grid.k_blocks, left * len(table) + right, len(table) ** 2, words)

    counts = _counts(a, grid) + _counts(b, grid)
    grid.check_count(int(counts.sum()))
    stripes = map(stripe, spans(counts, BLOCKS_AT_ONCE))
    if order is None:
        return assemble(grid, stripes)
    result = assemble(grid, stripes, order=order, causal=True)
    return result if a.causal and b.causal else replace(result, causal=natural_order(result).causal)


def per_head(layouts: Sequence[Layout]) -> Layout:
    """Give each head a pattern of its own.

    Args:
        layouts: one after the other; one of several heads gives as many. They keep their orders: where some have one,
            ``order`` becomes ``(heads, n)``, the identity for heads that had none.

    Raises:
        ValueError: if there are none, or they differ in ``n_q``, ``n_k``, ``block_size`` or device.
    """
    if isinstance(layouts, Layout):
        raise TypeError("layouts must be a sequence of layouts, got one Layout")
    layouts = list(layouts)
    if not layouts:
        raise ValueError("layouts must hold at least one layout, got none")
    for place, layout in enumerate(layouts):
        if not isinstance(layout, Layout):
            raise TypeError(f"layouts[{place}] must be a Layout, got {type(layout).__name__}")
        _check_fit("layouts[0]", layouts[0], f"layouts[{place}]", layout)
    first = layouts[0]
    grid = _grid(first, sum(layout.heads for layout in layouts))
    grid.check_count(sum(layout.kept_blocks for layout in layouts))
    order = None
    if any(layout.order.numel() for layout in layouts):
        if all(len(layout.order) == 1 and torch.equal(layout.order, first.order) for layout in layouts):
            order = first.order
        else:
            order = torch.cat([_order_of_heads(layout) for layout in layouts])
    return assemble(grid, _side_by_side(layouts, grid), order=order, causal=all(layout.causal for layout in layouts))


def _side_by_side(layouts: Sequence[Layout], grid: Grid) -> Iterator[Stripe]:
    head = 0
    for layout in layouts:
        line, column, mask = _blocks(layout, _grid(layout, layout.heads))
        yield Stripe(line + head * grid.q_blocks, column, mask, layout.mask_table)
        head += layout.heads


def natural_order(layout: Layout) -> Layout:
    """The same pairs in blocks of positions. Time O(area of the kept blocks), memory O(blocks of the result)."""
    if not layout.order.numel():
        return layout
    grid = _grid(layout, layout.heads)
    return assemble(grid, (stripe for head in range(layout.heads) for stripe in _unordered(layout, grid, head)))


def _unordered(layout: Layout, grid: Grid, head: int) -> Iterator[Stripe]:
    """One head's blocks of positions, some block rows at a time."""
    order = layout.order[head if len(layout.order) > 1 else 0].long()
    if torch.equal(order, grid.arange(layout.n_q)):
        line, column, mask = _blocks(layout, grid, slice(head * grid.q_blocks, (head + 1) * grid.q_blocks))
        partial = mask >= 0
        used, mask[partial] = torch.unique(mask[partial], return_inverse=True)
        yield Stripe(line, column, mask, layout.mask_table[used])
        return
    size, lists = grid.block_size, layout.rows
    table = torch.cat([layout.mask_table, _full_mask(grid)])  # -1 is a full block
    place = layout.places[head if len(layout.order) > 1 else 0].long()
    lines = lists.starts[head * grid.q_blocks : (head + 1) * grid.q_blocks + 1].long()
    starts, counts = lines[:-1][place // size], lines.diff()[place // size]  # of each position's line
    area = torch.zeros(grid.q_blocks, dtype=torch.int64, device=grid.device)
    area.index_add_(0, grid.arange(grid.n_q) // size, counts * size)
    for rows in spans(area, _PAIRS_AT_ONCE):
        top = rows.start
        here = slice(top * size, rows.stop * size)
        entry = ranges(starts[here], counts[here])
        query = torch.repeat_interleave(grid.arange(grid.n_q)[here], counts[here])
        kept = _masks.unpack(table[lists.masks[entry], place[query] % size], size)  # [entries, b]
        which, bit = kept.nonzero(as_tuple=True)
        i, j = query[which], order[lists.blocks[entry[which]] * size + bit]
        block = (i // size - top) * grid.k_blocks + j // size
        member, which = representatives(block, (rows.stop - top) * grid.k_blocks)
        words = torch.zeros(len(member), size, table.shape[2], dtype=torch.int32, device=grid.device)
        # A sum of distinct bits is their union.
        word = (which * size + i % size) * table.shape[2] + j % size // 32
        words.view(-1).scatter_add_(0, word, torch.ones_like(j, dtype=torch.int32) << (j % size % 32).to(torch.int32))
        block = block[member]
        row = block // grid.k_blocks
        yield from_masks(grid, head * grid.q_blocks + top + row, block - row * grid.k_blocks, words)


def _grid(layout: Layout, heads: int) -> Grid:
    return Grid(layout.n_q, layout.n_k, layout.block_size, heads, layout.device)


def _counts(layout: Layout, grid: Grid) -> Tensor:
    """Kept blocks of each line of the grid; all heads have the same where they share one pattern."""
    return layout.rows.starts.long().diff().repeat(grid.heads // layout.heads)


def _blocks(layout: Layout, grid: Grid, lines: slice | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Lines of the grid, columns and masks of the kept blocks of some lines, in the order of a :class:`Stripe`."""
    line = grid.arange(grid.heads * grid.q_blocks)[lines or slice(None)]
    own = line % (layout.heads * grid.q_blocks)
    starts = layout.rows.starts.long()
    counts = starts[own + 1] - starts[own]
    entry = ranges(starts[own], counts)
    line = torch.repeat_interleave(line, counts)
    column = layout.rows.blocks[entry].long()
    place = torch.argsort(line * grid.k_blocks + column)
    return line, column[place], layout.rows.masks[entry[place]].long()


def _full_mask(grid: Grid) -> Tensor:
    return _masks.first_bits(grid.block_size, grid.device)[-1].expand(1, grid.block_size, -1)


def _order_of_heads(layout: Layout) -> Tensor:
    if layout.order.numel():
        return layout.order.expand(layout.heads, -1)
    return torch.arange(layout.n_q, dtype=torch.int32, device=layout.device).expand(layout.heads, -1)


def _common_order(a: Layout, b: Layout) -> Tensor | None:
    """The order of both layouts; None if that is the natural one or they differ."""
    if not a.order.numel() or not b.order.numel():
        return None
    longer = max(a.order, b.order, key=len)
    return longer if bool((a.order == longer).all() & (b.order == longer).all()) else None


def _check_fit(name_a: str, a: Layout, name_b: str, b: Layout) -> None:
    for what in ("n_q", "n_k", "block_size", "device"):
        left, right = getattr(a, what), getattr(b, what)
        if left != right:
            raise ValueError(f"{name_a} and {name_b} must have the same {what}, got {left} and {right}")
