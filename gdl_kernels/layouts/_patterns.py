"""The named patterns."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from . import _masks
from ._build import BLOCK_SIZES, INT32_MAX, Grid, Stripe, assemble, from_masks, from_predicate, spans
from ._layout import Layout

#: Positions of a mask that are cut into blocks at once.
_MASK_AT_ONCE = 2**24


def full(n_q: int, n_k: int | None = None, *, block_size: int = 64) -> Layout:
    """Every query keeps every key.

    Args:
        n_q: queries.
        n_k: keys; default ``n_q``.

    Raises:
        ValueError, TypeError: if a number is out of range or no integer; so for every constructor here.
    """
    _integer("n_q", n_q, 1, INT32_MAX)
    n_k = n_q if n_k is None else _integer("n_k", n_k, 1, INT32_MAX)
    grid = Grid(n_q, n_k, _block_size(block_size))
    zero = grid.arange(grid.q_blocks)[:, None] * 0
    return from_predicate(grid, zero, zero + grid.k_blocks, _alike, 1, _everything)


def causal(n: int, *, block_size: int = 64) -> Layout:
    """Query ``i`` keeps keys ``j <= i``."""
    grid = _square(n, block_size)
    row = grid.arange(grid.q_blocks)[:, None]
    return from_predicate(
        grid, row * 0, row + 1, lambda head, row, column: (row > column).long(), 2, lambda head, i, j: j <= i
    )


def local(n: int, window: int, *, causal: bool = True, block_size: int = 64) -> Layout:
    """Query ``i`` keeps the keys near it: ``0 <= i - j < window``, or ``|i - j| < window`` when not causal.

    Args:
        window: at least 1, which keeps only the query's own position.
    """
    grid = _square(n, block_size)
    window = min(_integer("window", window, 1), n)

    def keep(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j < window) & (j <= i if causal else j - i < window)

    row = grid.arange(grid.q_blocks)[:, None]
    first = (row * block_size - window + 1).clamp(min=0) // block_size
    last = row if causal else ((row + 1) * block_size + window - 2).clamp(max=n - 1) // block_size
    reach = (window - 1) // block_size + 1
    return from_predicate(
        grid, first, last - first + 1, lambda head, row, column: row - column + reach, 2 * reach + 1, keep
    )


def strided(n: int, stride: int, *, causal: bool = True, block_size: int = 64) -> Layout:
    """Query ``i`` keeps every ``stride``-th key: ``(i - j) % stride == 0``, and ``j <= i`` when causal.

    The second head of the Sparse Transformer's strided attention (arXiv 1904.10509, section 4.2); ``local(n, stride)``
    is the first. In natural order nearly every block would hold a few of these keys. So this layout has an ``order``,
    positions sorted by ``(position % stride, position)``, in which what it keeps lies in blocks along the diagonal.
    A union with a layout in another order brings it to natural order: exact, but with the blocks of dense attention.

    Args:
        stride: at least 1; need not divide ``n``.
    """
    grid = _square(n, block_size)
    _integer("stride", stride, 1)
    if stride >= n:
        return local(n, 1, block_size=block_size)
    if stride == 1:
        return local(n, n, causal=causal, block_size=block_size)
    position = grid.arange(n)
    order = torch.argsort(position % stride, stable=True)
    # Residues below n % stride have short + 1 positions each, the others short. Place `turn` is where that changes.
    short, longer = divmod(n, stride)
    turn = longer * (short + 1)

    def residue(place: Tensor) -> Tensor:
        return torch.where(place < turn, place // (short + 1), longer + (place - turn) // short)

    def first_place(residue: Tensor) -> Tensor:
        return residue * short + residue.clamp(max=longer)

    def keep(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = residue(i) == residue(j)
        return same & (j <= i) if causal else same

    row = grid.arange(grid.q_blocks)[:, None]
    first = first_place(residue(row * block_size)) // block_size
    end = ((row + 1) * block_size).clamp(max=n)
    last = row if causal else (first_place(residue(end - 1) + 1) - 1) // block_size
    # The mask of a block depends on where its first row is in its residue, and on how far to the left the block is.
    reach = short // block_size + 1

    def classes(head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        place = row * block_size
        phase = torch.where(place < turn, place % (short + 1), short + 1 + (place - turn) % short)
        phase = torch.where((place < turn) & (turn < place + block_size), 2 * short + 1, phase)
        straddles = (column * block_size < turn) & (turn < (column + 1) * block_size)
        return ((phase * (2 * reach + 1)) + (row - column + reach)) * 2 + straddles

    bound = (2 * short + 2) * (2 * reach + 1) * 2
    return from_predicate(
        grid, first, last - first + 1, classes, bound, keep, order=order[None].to(torch.int32), causal=causal
    )


def fixed(
    n: int,
    stride: int,
    summary: int,
    *,
    heads: int = 1,
    distinct: bool = True,
    causal: bool = True,
    part: Literal["merged", "local", "summary"] = "merged",
    block_size: int = 64,
) -> Layout:
    """The fixed attention of the Sparse Transformer (arXiv 1904.10509, section 4.2).

    Query ``i`` of head ``h`` keeps, of the keys ``j <= i`` (of all keys when not causal),

    - local: those of its own run of ``stride`` positions, ``i // stride == j // stride``, and
    - summary: of every run ``summary`` columns, ``stride - (u + 1) * summary <= j % stride < stride - u * summary``,
      with ``u = h % (stride // summary)``: the last ones for head 0, those before them for head 1, and so on.

    Merged heads keep the union. For layers that alternate between the two, build one layout of each ``part``. A query
    before the first summary column keeps nothing in the summary part alone.

    Args:
        stride: length of a run, at least 1; need not divide ``n``.
        summary: summary columns of a run that a head keeps, 1 to ``stride``.
        heads: heads that take distinct summary columns.
        distinct: if False, all heads take the last ones (``u = 0``).
        part: ``"merged"``, ``"local"`` or ``"summary"``.

    Returns:
        A layout of ``heads`` heads; of one that all share if they don't differ (``distinct=False``, ``part="local"``,
        or ``stride // summary == 1``).
    """
    _integer("stride", stride, 1)
    _integer("summary", summary, 1, stride)
    _integer("heads", heads, 1)
    if part not in ("merged", "local", "summary"):
        raise ValueError(f"part must be 'merged', 'local' or 'summary', got {part!r}")
    sets = min(heads, stride // summary) if distinct and part != "local" else 1
    grid = _square(n, block_size, heads if sets > 1 else 1)
    grid.check_count(grid.heads * grid.q_blocks)  # each row of each head keeps a block
    with_local, with_summary = part != "summary", part != "local"

    def keep(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kept = torch.zeros_like(i - j, dtype=torch.bool)
        if with_local:
            kept |= i // stride == j // stride
        if with_summary:
            end = stride - head % sets * summary
            kept |= (j % stride >= end - summary) & (j % stride < end)
        return kept & (j <= i) if causal else kept

    # Columns with a summary key, for each set of heads: a block's own start is one, or the next start falls into it.
    column = grid.arange(grid.k_blocks)
    start = column * block_size
    columns = []
    for u in range(sets if with_summary else 0):
        first = stride - (u + 1) * summary
        following = start + (first - start) % stride
        inside = (start % stride >= first) & (start % stride < first + summary)
        columns.append(column[inside | (following < (start + block_size).clamp(max=n))])

    # Each row takes the summary columns before its run, the blocks of its run, and the summary columns after it.
    row = grid.arange(grid.q_blocks)
    last_row = row if causal else row * 0 + grid.k_blocks - 1
    run = row * block_size // stride * stride // block_size
    run_end = ((((row + 1) * block_size - 1) // stride + 1) * stride - 1).clamp(max=n - 1) // block_size
    run_end = torch.minimum(run_end, last_row)
    if not with_local:
        run, run_end = last_row + 1, last_row
    starts, counts, offset = [], [], 0
    for members in columns or [column[:0]]:
        before = torch.searchsorted(members, run)
        after = torch.searchsorted(members, run_end, right=True)
        end = torch.searchsorted(members, last_row, right=True)
        starts.append(torch.stack([before * 0 + offset, run + sum(map(len, columns)), after + offset], 1))
        counts.append(torch.stack([before, run_end - run + 1, end - after], 1))
        offset += len(members)
    which = grid.arange(grid.heads) % sets

    # A mask depends on where the columns are in their run and, close to the diagonal, on how close. Both repeat.
    period = stride // math.gcd(stride, block_size)
    reach = min(stride // block_size + 1, grid.k_blocks)

    def classes(head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        distance = (row - column).clamp(-reach - 1, reach + 1)
        distance = torch.where(distance < -reach, reach + 1, distance)  # far ahead is as far behind: summary only
        return (head % sets * period + column % period) * (2 * reach + 2) + distance + reach

    return from_predicate(
        grid,
        torch.stack(starts)[which].flatten(0, 1),
        torch.stack(counts)[which].flatten(0, 1),
        classes,
        sets * period * (2 * reach + 2),
        keep,
        values=torch.cat([*columns, column]),
    )


def sliding_with_sinks(n: int, window: int, sinks: int, *, block_size: int = 64) -> Layout:
    """Query ``i`` keeps, of the keys ``j <= i``, the last ``window``, ``i - j < window``, and the first ``sinks``.

    As in StreamingLLM (arXiv 2309.17453), where a few first tokens take the attention that has nowhere to go.

    Args:
        window: at least 1.
        sinks: at least 0.
    """
    grid = _square(n, block_size)
    window = min(_integer("window", window, 1), n)
    sinks = min(_integer("sinks", sinks, 0), n)
    row = grid.arange(grid.q_blocks)
    first = (row * block_size - window + 1).clamp(min=0) // block_size
    sink_blocks = -(-sinks // block_size)
    before = first.clamp(max=sink_blocks)
    reach = (window - 1) // block_size + 2  # blocks this far behind hold nothing of the window

    def classes(head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        # Sink columns are alike, but for a last one that `sinks` cuts.
        sink = (column < sink_blocks).long() + (column < sinks // block_size)
        return sink * (reach + 1) + (row - column).clamp(max=reach)

    return from_predicate(
        grid,
        torch.stack([row * 0, first], 1),
        torch.stack([before, row - first + 1], 1),
        classes,
        3 * (reach + 1),
        lambda head, i, j: ((i - j < window) | (j < sinks)) & (j <= i),
    )


def from_mask(mask: Tensor, *, block_size: int = 64) -> Layout:
    """What a boolean mask keeps.

    Args:
        mask: bool, ``(n_q, n_k)`` for all heads or ``(heads, n_q, n_k)``; the layout is on its device.
    """
    mask = _three_dimensional("mask", mask, "queries, keys")
    heads, n_q, n_k = mask.shape
    grid = Grid(n_q, n_k, _block_size(block_size), heads, mask.device)
    costs = torch.full((heads * grid.q_blocks,), grid.k_blocks * block_size**2)

    def stripe(lines: slice) -> Stripe:
        line = torch.arange(lines.start, lines.stop, device=mask.device)
        head, row = line // grid.q_blocks, line % grid.q_blocks
        query = (row * block_size)[:, None] + torch.arange(block_size, device=mask.device)
        padded = torch.zeros(len(line), block_size, grid.k_blocks * block_size, dtype=torch.bool, device=mask.device)
        padded[:, :, :n_k] = mask[head[:, None], query.clamp(max=n_q - 1)]
        tiles = padded.unflatten(2, (grid.k_blocks, block_size)).transpose(1, 2)  # [lines, columns, b, b]
        which, column = tiles.any(-1).any(-1).nonzero(as_tuple=True)
        return from_masks(grid, line[which], column, _masks.pack(tiles[which, column]))

    return assemble(grid, map(stripe, spans(costs, _MASK_AT_ONCE)))


def from_blocks(blocks: Tensor, *, block_size: int = 64, causal: bool = False) -> Layout:
    """Whole blocks of ``block_size`` queries by ``block_size`` keys.

    Args:
        blocks: bool, ``(q_blocks, k_blocks)`` for all heads or ``(heads, q_blocks, k_blocks)``; the layout has
            ``q_blocks * block_size`` queries and is on its device.
        causal: of the given blocks keep only keys ``j <= i``.
    """
    blocks = _three_dimensional("blocks", blocks, "q_blocks, k_blocks")
    heads, q_blocks, k_blocks = blocks.shape
    grid = Grid(q_blocks * _block_size(block_size), k_blocks * block_size, block_size, heads, blocks.device)
    counts = blocks.sum(2).flatten()
    starts = counts.cumsum(0) - counts
    column = blocks.nonzero()[:, 2]
    if not causal:
        return from_predicate(grid, starts[:, None], counts[:, None], _alike, 1, _everything, values=column)

    def classes(head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (row - column).clamp(-1, 1) + 1

    return from_predicate(grid, starts[:, None], counts[:, None], classes, 3, lambda head, i, j: j <= i, values=column)


def _alike(head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return torch.zeros_like(row)


def _everything(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.ones_like(i, dtype=torch.bool)


def _square(n: int, block_size: int, heads: int = 1) -> Grid:
    _integer("n", n, 1, INT32_MAX)
    return Grid(n, n, _block_size(block_size), heads)


def _block_size(block_size: int) -> int:
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size!r}")
    return block_size


def _integer(name: str, value: int, low: int, high: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(
            f"{name} must be {f'at least {low}' if high is None else f'from {low} to {high}'}, got {value}"
        )
    return value


def _three_dimensional(name: str, mask: Tensor, sizes: str) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, True for what is kept, got {mask.dtype}")
    if mask.dim() not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"{name} must be ({sizes}) or (heads, {sizes}), none of them 0, got shape {tuple(mask.shape)}")
    return mask if mask.dim() == 3 else mask[None]
