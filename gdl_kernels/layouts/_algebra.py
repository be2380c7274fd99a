"""Layouts from layouts: union, intersection, heads side by side, natural order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from . import _masks
from ._build import BLOCKS_AT_ONCE, Grid, Stripe, assemble, from_masks, ranges, representatives, resolve, spans
from ._layout import Layout

#: Pairs expanded at once when an order is undone; bounds temporary memory to some 100 MB.
_PAIRS_AT_ONCE = 2**20


def union(a: Layout, b: Layout) -> Layout:
    """Of layouts whose orders differ: in parts, if these have fewer blocks together than the union in natural order.

    Parts of one order are united first. The blocks are counted before what two parts share is taken from one of them.
    """
    heads = _check_operands(a, b)
    parts: list[Layout] = []
    for layout in (*a.parts(), *b.parts()):
        for place, part in enumerate(parts):
            if _common_order(part, layout) is not None:
                parts[place] = _combine(part, layout, torch.bitwise_or)
                break
        else:
            parts.append(layout)
    if len(parts) == 1:
        return parts[0]
    parts = [part if part.heads == heads else per_head([part] * heads) for part in parts]
    if _fits_natural_order(parts, sum(part.kept_blocks for part in parts)):
        return reduce(_unite, map(natural_order, parts))
    parts.sort(key=lambda part: part.order.numel() > 0)  # natural order first
    causal = all(part.causal for part in parts)
    for place in range(1, len(parts)):
        parts[place] = reduce(_difference, parts[:place], parts[place])
    first, *others = [part for part in parts if part.kept_blocks] or parts[:1]
    rest = None
    for part in reversed(others):
        rest = replace(part, rest=rest)
    return replace(first, causal=causal, rest=rest)


def intersection(a: Layout, b: Layout) -> Layout:
    """In natural order where orders differ or a layout has parts."""
    _check_operands(a, b)
    if a.rest is not None or b.rest is not None or _common_order(a, b) is None:
        a, b = natural_order(a), natural_order(b)
    return _combine(a, b, torch.bitwise_and)


def _unite(a: Layout, b: Layout) -> Layout:
    return _combine(a, b, torch.bitwise_or)


def _check_operands(a: Layout, b: Layout) -> int:
    """The heads of what two layouts make."""
    _check_fit("the left layout", a, "the right one", b)
    if a.heads != b.heads and 1 not in (a.heads, b.heads):
        raise ValueError(f"layouts must have the same heads, or one of them 1, got {a.heads} and {b.heads}")
    return max(a.heads, b.heads)


def _combine(a: Layout, b: Layout, operation: Callable[[Tensor, Tensor], Tensor]) -> Layout:
    """Combine the masks of two layouts of one order."""
    order = _common_order(a, b)
    assert order is not None
    if not order.numel():
        return _blockwise(a, b, operation, None, None)
    result = _blockwise(a, b, operation, order, True)
    return result if a.causal and b.causal else replace(result, causal=natural_order(result).causal)


def _blockwise(
    a: Layout, b: Layout, operation: Callable[[Tensor, Tensor], Tensor], order: Tensor | None, causal: bool | None
) -> Layout:
    """Combine masks block by block; a block that only one layout keeps meets one that keeps nothing."""
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
    return assemble(grid, map(stripe, spans(counts, BLOCKS_AT_ONCE)), order=order, causal=causal)


def _difference(a: Layout, b: Layout) -> Layout:
    """What ``a`` keeps and ``b`` does not, in the order of ``a``, which is not that of ``b``; as many heads in both.

    Time O(area of the kept blocks of ``b``).
    """
    grid = _grid(a, a.heads)
    stripes = (stripe for head in range(a.heads) for stripe in _reordered(b, grid, head, a))
    shared = assemble(grid, stripes, order=a.order, causal=True)
    return _blockwise(a, shared, lambda own, other: own & ~other, a.order, a.causal)


def _fits_natural_order(parts: Sequence[Layout], most: int) -> bool:
    """Whether the union in natural order has no more blocks than ``most``. Stops counting as soon as it has."""
    grid = _grid(parts[0], parts[0].heads)
    size, found = grid.block_size, 0
    for head in range(grid.heads):
        permuted = [_Pairs(part, head) for part in parts if _order_of_head(part, head) is not None]
        natural = [part for part in parts if _order_of_head(part, head) is None]
        area = torch.zeros(grid.q_blocks, dtype=torch.int64, device=grid.device)
        for pairs in permuted:
            area.index_add_(0, grid.arange(grid.n_q) // size, pairs.areas())
        for rows in spans(area, _PAIRS_AT_ONCE):
            occupied = torch.zeros(rows.stop - rows.start, grid.k_blocks, dtype=torch.bool, device=grid.device)
            top = head * grid.q_blocks + rows.start
            for part in natural:
                line, column, _ = _blocks(part, grid, slice(top, top + len(occupied)))
                occupied[line - top, column] = True
            for pairs in permuted:
                query, key = pairs.of(grid.arange(grid.n_q)[rows.start * size : rows.stop * size])
                occupied[query // size, key // size] = True
            found += int(occupied.sum())
            if found > most:
                return False
    return True


def per_head(layouts: Sequence[Layout]) -> Layout:
    """Give each head a pattern of its own.

    Args:
        layouts: one after the other; one of several heads gives as many. They keep their orders: where some have one,
            ``order`` becomes ``(heads, n)``, the identity for heads that had none. One with ``rest`` is taken in
            natural order.

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
    layouts = [layout if layout.rest is None else natural_order(layout) for layout in layouts]
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
    if layout.rest is not None:
        return reduce(_unite, map(natural_order, layout.parts()))
    if not layout.order.numel():
        return layout
    grid = _grid(layout, layout.heads)
    return assemble(grid, (stripe for head in range(layout.heads) for stripe in _unordered(layout, grid, head)))


def _unordered(layout: Layout, grid: Grid, head: int) -> Iterator[Stripe]:
    """One head's blocks of positions, some block rows at a time."""
    if _order_of_head(layout, head) is not None:
        yield from _reordered(layout, grid, head, None)
        return
    line, column, mask = _blocks(layout, grid, slice(head * grid.q_blocks, (head + 1) * grid.q_blocks))
    partial = mask >= 0
    used, mask[partial] = torch.unique(mask[partial], return_inverse=True)
    yield Stripe(line, column, mask, layout.mask_table[used])


def _reordered(layout: Layout, grid: Grid, head: int, target: Layout | None) -> Iterator[Stripe]:
    """One head's pairs in blocks of positions or, of those in the blocks that ``target`` keeps, in its blocks."""
    size, pairs = grid.block_size, _Pairs(layout, head)
    order = places = grid.arange(grid.n_q)
    if target is not None:
        own = head if len(target.order) > 1 else 0
        order, places = target.order[own].long(), target.places[own].long()
    area = torch.zeros(grid.q_blocks, dtype=torch.int64, device=grid.device)
    area.index_add_(0, places // size, pairs.areas())
    for rows in spans(area, _PAIRS_AT_ONCE):
        top, first = rows.start, head * grid.q_blocks + rows.start
        query, key = pairs.of(order[top * size : rows.stop * size])  # from here on places: of queries from the top
        key = places[key]
        block = query // size * grid.k_blocks + key // size
        if target is not None:
            kept = torch.zeros((rows.stop - top) * grid.k_blocks, dtype=torch.bool, device=grid.device)
            line, column, _ = _blocks(target, grid, slice(first, first + rows.stop - top))
            kept[(line - first) * grid.k_blocks + column] = True
            inside = kept[block]
            query, key, block = query[inside], key[inside], block[inside]
        member, which = representatives(block, (rows.stop - top) * grid.k_blocks)
        words = torch.zeros(len(member), size, -(-size // 32), dtype=torch.int32, device=grid.device)
        # A sum of distinct bits is their union.
        word = (which * size + query % size) * words.shape[2] + key % size // 32
        bit = torch.ones_like(key, dtype=torch.int32) << (key % size % 32).to(torch.int32)
        words.view(-1).scatter_add_(0, word, bit)
        block = block[member]
        row = block // grid.k_blocks
        yield from_masks(grid, first + row, block - row * grid.k_blocks, words)


class _Pairs:
    """The kept pairs of one head of a layout without ``rest``, one by one."""

    def __init__(self, layout: Layout, head: int) -> None:
        head = head if layout.heads > 1 else 0
        self._size, self._rows = layout.block_size, layout.rows
        self._table = torch.cat([layout.mask_table, _full_mask(_grid(layout, 1))])  # -1 is a full block
        self._order = _order_of_head(layout, head)
        positions = torch.arange(layout.n_q, device=layout.device)
        own = head if len(layout.places) > 1 else 0
        self._place = positions if self._order is None else layout.places[own].long()
        starts = layout.rows.starts.long()
        line = head * layout.q_blocks + self._place // self._size
        self._starts, self._counts = starts[line], starts.diff()[line]

    def areas(self) -> Tensor:
        """How many pairs the kept blocks have, of each query, int64 ``(n_q,)``."""
        return self._counts * self._size

    def of(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """For each pair that some queries keep: where its query is among them, and the position of its key."""
        size, counts = self._size, self._counts[queries]
        entry = ranges(self._starts[queries], counts)
        query = torch.repeat_interleave(torch.arange(len(queries), device=queries.device), counts)
        bits = self._table[self._rows.masks[entry], self._place[queries][query] % size]
        which, bit = _masks.unpack(bits, size).nonzero(as_tuple=True)  # of [entries, b]
        key = self._rows.blocks[entry[which]] * size + bit
        return query[which], key if self._order is None else self._order[key]


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


def _order_of_head(layout: Layout, head: int) -> Tensor | None:
    """int64 ``(n,)``; None where that is the natural order."""
    if not layout.order.numel():
        return None
    order = layout.order[head if len(layout.order) > 1 else 0].long()
    return None if torch.equal(order, torch.arange(layout.n_q, device=layout.device)) else order


def _common_order(a: Layout, b: Layout) -> Tensor | None:
    """The ``order`` of both layouts, which is empty where that is the natural one; None if they differ."""
    if not a.order.numel() or not b.order.numel():
        return a.order if a.order.numel() == b.order.numel() else None
    longer = max(a.order, b.order, key=len)
    return longer if bool((a.order == longer).all() & (b.order == longer).all()) else None


def _check_fit(name_a: str, a: Layout, name_b: str, b: Layout) -> None:
    for what in ("n_q", "n_k", "block_size", "device"):
        left, right = getattr(a, what), getattr(b, what)
        if left != right:
            raise ValueError(f"{name_a} and {name_b} must have the same {what}, got {left} and {right}")
