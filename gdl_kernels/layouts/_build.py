"""From candidate blocks to a layout: evaluate each distinct mask once, drop what is empty, sort into lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from . import _masks
from ._layout import BlockLists, Layout

BLOCK_SIZES = (16, 32, 64, 128)
INT32_MAX = 2**31 - 1

#: Positions that a predicate is evaluated for at once: some 8 MB for each int64 temporary.
_POSITIONS_AT_ONCE = 2**20

#: Candidate blocks in a stripe: few enough for the cache, enough to hide the cost of a call.
BLOCKS_AT_ONCE = 2**17

#: ``keep(head, i, j)``: bool, whether query ``i`` of a head keeps key ``j``; int64 tensors that broadcast.
Keep = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """The blocks of a layout. Line ``head * q_blocks + row`` holds block row ``row`` of a head."""

    n_q: int
    n_k: int
    block_size: int
    heads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def q_blocks(self) -> int:
        return -(-self.n_q // self.block_size)

    @property
    def k_blocks(self) -> int:
        return -(-self.n_k // self.block_size)

    def arange(self, end: int) -> Tensor:
        return torch.arange(end, device=self.device)

    def head_and_row(self, line: Tensor) -> tuple[Tensor, Tensor]:
        if self.heads == 1:
            return torch.zeros_like(line), line
        head = line // self.q_blocks
        return head, line - head * self.q_blocks

    def check_count(self, blocks: int) -> None:
        if blocks > INT32_MAX:
            raise ValueError(
                f"a layout must list at most {INT32_MAX} blocks; {self.n_q} x {self.n_k} positions and {self.heads} "
                f"heads in blocks of {self.block_size} would make it {blocks}: take larger blocks or a sparser pattern"
            )


class Stripe(NamedTuple):
    """The kept blocks of some consecutive lines, in order, columns ascending in each line.

    Attributes:
        line, column: integers ``(kept,)``.
        mask: integers ``(kept,)``, -1 for a full block, else its mask's place in ``words``.
        words: packed masks of partial blocks, rows past ``n_q`` as ones; may have repeats.
    """

    line: Tensor
    column: Tensor
    mask: Tensor
    words: Tensor


def ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """``start, ..., start + count - 1`` for each start and count, end to end."""
    shift = torch.repeat_interleave(starts - (counts.cumsum(0) - counts).to(starts.dtype), counts)
    return shift.add_(torch.arange(len(shift), dtype=shift.dtype, device=shift.device))


def representatives(classes: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """A member of each class that occurs, classes ascending, and the place of each element's class among those.

    Args:
        classes: integers from 0 to ``bound - 1``.
    """
    place = torch.arange(len(classes), device=classes.device)
    if bound > 4 * len(classes) + 1024:
        values, index = torch.unique(classes, return_inverse=True)
        return place.new_empty(len(values)).scatter_(0, index, place), index
    member = place.new_full((bound,), -1)
    member[classes] = place
    occurs = member >= 0
    return member[occurs], (occurs.cumsum(0, dtype=torch.int32) - 1)[classes]


def spans(costs: Tensor, at_once: int) -> Iterator[slice]:
    """Consecutive elements whose costs come to about ``at_once`` together."""
    span = costs.cumsum(0) // at_once
    start = 0
    for length in torch.unique_consecutive(span, return_counts=True)[1].tolist():
        yield slice(start, start + length)
        start += length


def from_predicate(
    grid: Grid,
    starts: Tensor,
    counts: Tensor,
    classes: Callable[[Tensor, Tensor, Tensor], Tensor],
    bound: int,
    keep: Keep,
    *,
    values: Tensor | None = None,
    order: Tensor | None = None,
    causal: bool | None = None,
) -> Layout:
    """The layout that keeps what a predicate keeps.

    Args:
        starts, counts: int64 ``(heads * q_blocks, segments)``: the block columns that a line may keep, as
            ``values[start : start + count]`` for each segment, ascending over all of them.
        classes: ``classes(head, row, column)`` of some blocks: integers from 0 to ``bound - 1``. Blocks of one class
            have one mask, but for the ends of queries and keys.
        keep: need not mind those ends.
        values: default ``0, 1, 2, ...``.
        order, causal: as :func:`assemble`.
    """
    inside = grid.arange(grid.block_size)
    total = counts.sum(1)
    grid.check_count(int(total.sum()))
    dtype = torch.int32 if bound <= INT32_MAX else torch.int64  # building is bound by memory bandwidth
    values = values if values is None else values.to(dtype)

    def stripe(lines: slice) -> Stripe:
        column = ranges(starts[lines].flatten().to(dtype), counts[lines].flatten())
        if values is not None:
            column = values[column]
        line = torch.arange(lines.start, lines.stop, dtype=dtype, device=grid.device)
        line = torch.repeat_interleave(line, total[lines])
        head, row = grid.head_and_row(line)

        def words(member: Tensor) -> Tensor:
            packed = []
            for part in member.split(max(1, _POSITIONS_AT_ONCE // grid.block_size**2)):
                i = (row[part].long() * grid.block_size)[:, None, None] + inside[:, None]
                j = (column[part].long() * grid.block_size)[:, None, None] + inside
                kept = keep(head[part][:, None, None], i, j).expand(len(part), grid.block_size, grid.block_size)
                packed.append(_masks.pack(kept.contiguous()))
            return torch.cat(packed)

        return resolve(grid, line, column, classes(head, row, column), bound, words)

    return assemble(grid, map(stripe, spans(total, BLOCKS_AT_ONCE)), order=order, causal=causal)


def resolve(
    grid: Grid, line: Tensor, column: Tensor, classes: Tensor, bound: int, words: Callable[[Tensor], Tensor]
) -> Stripe:
    """Drop candidate blocks that keep nothing, and tell full ones from partial ones.

    Args:
        line, column: candidate blocks, in the order of a :class:`Stripe`.
        classes: as in :func:`from_predicate`.
        words: ``words(members)``: packed masks ``(members, block_size, words)`` of the candidates at some places.
    """
    if len(line) == 0:
        return Stripe(line, column, line, no_masks(grid))
    # Blocks at the ends have masks of their own: keys past n_k are dropped, and rows past n_q don't keep a block from
    # being full.
    if grid.n_q % grid.block_size:
        classes, bound = classes + bound * (grid.head_and_row(line)[1] == grid.q_blocks - 1), 2 * bound
    if grid.n_k % grid.block_size:
        classes, bound = classes + bound * (column == grid.k_blocks - 1), 2 * bound
    member, which = representatives(classes, bound)
    queries = (grid.n_q - grid.head_and_row(line[member])[1] * grid.block_size).clamp(max=grid.block_size)
    keys = (grid.n_k - column[member] * grid.block_size).clamp(max=grid.block_size)
    exists = (grid.arange(grid.block_size) < queries[:, None])[:, :, None]  # [members, b, 1]
    first_bits = _masks.first_bits(grid.block_size, grid.device)
    possible = first_bits[keys][:, None]  # [members, 1, words]
    mask = words(member) & possible
    kept = ((mask != 0) & exists).flatten(1).any(1)
    mask = torch.where(exists, mask, possible)
    full = (mask == first_bits[-1]).flatten(1).all(1)
    partial = kept & ~full
    index = torch.where(partial, partial.cumsum(0) - 1, torch.where(kept, -1, -2)).to(torch.int32)[which]
    if not bool(kept.all()):
        lasting = index > -2
        line, column, index = line[lasting], column[lasting], index[lasting]
    return Stripe(line, column, index, mask[partial])


def from_masks(grid: Grid, line: Tensor, column: Tensor, words: Tensor) -> Stripe:
    """:func:`resolve`, of candidate blocks that each have a packed mask."""
    words, index = _masks.distinct(words)
    return resolve(grid, line, column, index, len(words), lambda members: words[index[members]])


def assemble(
    grid: Grid, stripes: Iterable[Stripe], *, order: Tensor | None = None, causal: bool | None = None
) -> Layout:
    """Sort kept blocks into a layout's lists.

    Args:
        stripes: of all lines that keep something, in order.
        order: as :class:`Layout`; None when places are positions.
        causal: as :class:`Layout`; found out here if None, which needs ``order`` to be None too.
    """
    counts = torch.zeros(grid.heads * grid.q_blocks, 2, dtype=torch.int64, device=grid.device)  # full, partial
    blocks, masks, table, size = [], [], [], 0
    for line, column, mask, words in stripes:
        if len(line) == 0:
            continue
        words, index = _masks.distinct(words)
        mask = torch.cat([index + size, index.new_full((1,), -1)]).to(torch.int32)[mask]
        size += len(words)
        table.append(words)
        first, last = int(line[0]), int(line[-1])
        group = (line - first) * 2 + (mask >= 0)
        counts[first : last + 1] += torch.bincount(group, minlength=2 * (last - first + 1)).view(-1, 2)
        place = torch.argsort(group.to(torch.int32), stable=True)
        blocks.append(column[place].to(torch.int32))
        masks.append(mask[place])
    grid.check_count(int(counts.sum()))
    words, index = _masks.distinct(torch.cat([*table, no_masks(grid)]))
    mask = torch.cat([index, index.new_full((1,), -1)]).to(torch.int32)
    nothing = torch.empty(0, dtype=torch.int32, device=grid.device)
    rows = _lists(grid.heads, counts, torch.cat([*blocks, nothing]), mask[torch.cat([*masks, nothing])])
    if causal is None:
        causal = _is_causal(grid, rows, words)
    if order is None:
        order = torch.empty(0, 0, dtype=torch.int32, device=grid.device)
    columns = _transposed(grid, rows)
    return Layout(grid.n_q, grid.n_k, grid.block_size, grid.heads, causal, rows, columns, words, order)


def no_masks(grid: Grid) -> Tensor:
    return torch.empty(0, grid.block_size, -(-grid.block_size // 32), dtype=torch.int32, device=grid.device)


def _lists(heads: int, counts: Tensor, blocks: Tensor, masks: Tensor) -> BlockLists:
    """Lists of sorted blocks, from the counts ``(heads * lines, 2)`` of full and of partial ones in each line."""
    lengths = counts.sum(1)
    longest_first = torch.argsort(lengths, descending=True, stable=True)
    ends = lengths.cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    splits = (starts[:-1] + counts[:, 0]).view(heads, -1)
    return BlockLists(starts.to(torch.int32), splits.to(torch.int32), blocks, masks, longest_first.to(torch.int32))


def _transposed(grid: Grid, rows: BlockLists) -> BlockLists:
    row = torch.arange(grid.q_blocks, dtype=torch.int32, device=grid.device)
    counts, blocks, masks = [], [], []
    for head in range(grid.heads):
        starts = rows.starts[head * grid.q_blocks : (head + 1) * grid.q_blocks + 1].long()
        here = slice(int(starts[0]), int(starts[-1]))
        mask = rows.masks[here]
        group = rows.blocks[here] * 2 + (mask >= 0)
        place = torch.argsort(group, stable=True)
        blocks.append(torch.repeat_interleave(row, starts.diff())[place])
        masks.append(mask[place])
        counts.append(torch.bincount(group, minlength=2 * grid.k_blocks).view(-1, 2))
    return _lists(grid.heads, torch.cat(counts), torch.cat(blocks), torch.cat(masks))


def _is_causal(grid: Grid, rows: BlockLists, table: Tensor) -> bool:
    """Whether no query sees a later key: a question to the last full and the last partial block of each line."""
    row = grid.arange(grid.q_blocks).repeat(grid.heads)
    starts, ends, splits = rows.starts[:-1].long(), rows.starts[1:].long(), rows.splits.flatten().long()
    some = splits > starts
    if bool((rows.blocks[splits[some] - 1] >= row[some]).any()):
        return False
    some = ends > splits
    last, row = ends[some] - 1, row[some]
    if bool((rows.blocks[last] > row).any()):
        return False
    diagonal = rows.blocks[last] == row
    row, mask = row[diagonal], rows.masks[last[diagonal]].long()
    upper = _masks.pack(torch.ones(grid.block_size, grid.block_size, dtype=torch.bool, device=grid.device).triu(1))
    later = ((table & upper) != 0).any(2)  # [masks, b]
    end = row == grid.q_blocks - 1  # its rows past n_q mean nothing
    queries = grid.n_q - (grid.q_blocks - 1) * grid.block_size
    return not bool(later[mask[~end]].any() | later[mask[end], :queries].any())
