"""The data structure behind every layout."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _mark_dynamic(tensor: Tensor) -> None:
    """Tell torch.compile that sizes are data, as ``torch._dynamo.maybe_mark_dynamic`` does, whose import takes seconds.

    Else two that happen to be equal would be tied, or one that has not changed yet fixed, and a later layout would
    compile anew.
    """
    for marked in (tensor, tensor._base):  # of a view it looks at the base too
        if marked is not None:
            marked._dynamo_weak_dynamic_indices = set(range(marked.dim()))  # type: ignore[attr-defined]
            marked._has_dynamo_dim_marking = True  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class BlockLists:
    """For each block row (or block column) of each head, the blocks that it keeps.

    Line ``l`` of head ``h`` keeps ``blocks[starts[h * lines + l] : starts[h * lines + l + 1]]``: first its full blocks,
    then, from ``splits[h, l]`` on, its partial ones; each part in ascending order.

    Attributes:
        starts: int32 ``(heads * lines + 1,)``.
        splits: int32 ``(heads, lines)``, positions in ``blocks``.
        blocks: int32 ``(kept,)``, block columns in a list of rows, block rows in a list of columns.
        masks: int32 ``(kept,)``, a partial block's index into ``Layout.mask_table``; -1 for a full block.
        longest_first: int32 ``(heads * lines,)``, the lines ``h * lines + l`` by the lengths of their lists,
            descending.
    """

    starts: Tensor
    splits: Tensor
    blocks: Tensor
    masks: Tensor
    longest_first: Tensor

    def to(self, device: torch.device | str) -> BlockLists:
        return BlockLists(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """Which keys each query may see.

    ``a | b`` keeps what either keeps, ``a & b`` what both keep; where one has a pattern for all heads and the other one
    for each, the result has one for each. A union of layouts whose ``order`` differs keeps both orders where that takes
    fewer blocks than the natural one: the pairs of one are here, those of the others in ``rest``. An intersection of
    layouts whose orders differ is in natural order.

    Attributes:
        n_q, n_k: numbers of queries and keys.
        block_size: 16, 32, 64 or 128.
        heads: how many heads have a pattern of their own; 1 when all share one.
        causal: whether no query sees a later key; with ``rest``, neither here nor there.
        rows: kept block columns of each block row, for the forward pass and the gradient of the queries.
        columns: kept block rows of each block column, for the gradients of keys and values.
        mask_table: int32 ``(masks, block_size, ceil(block_size / 32))``. Bit ``j % 32`` of word ``[m, i, j // 32]``
            says whether row ``i`` of a partial block with mask ``m`` keeps column ``j``. Distinct masks are stored
            once. Keys past ``n_k`` are never kept, so a block of the last columns is partial unless ``n_k`` fills it.
            Rows past ``n_q`` do not exist: their bits mean nothing, and a kernel never reads them.
        order: int32 ``(heads, n)`` or ``(1, n)``: blocks are blocks of *places*, and place ``p`` of head ``h`` holds
            query and key ``order[h, p]``. Empty, ``(0, 0)``, when places are positions.
        rest: pairs kept besides, in blocks of an order of their own; no pair is kept twice. None where there are none.
            ``rows`` to ``places``, ``tensors()`` and ``sizes()`` are those of the pairs that are kept here; all else is
            of the whole.
        places: int32, the inverse: position ``i`` of head ``h`` is at place ``places[h, i]``. Empty where ``order`` is.
    """

    n_q: int
    n_k: int
    block_size: int
    heads: int
    causal: bool
    rows: BlockLists
    columns: BlockLists
    mask_table: Tensor
    order: Tensor
    rest: Layout | None = None
    places: Tensor = field(init=False)
    # What tensors() and sizes() give: every call of a kernel asks.
    _tensors: tuple[Tensor, ...] = field(init=False)
    _sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        n = torch.arange(self.order.shape[1], dtype=torch.int32, device=self.order.device)
        places = torch.empty_like(self.order).scatter_(1, self.order.long(), n.expand_as(self.order))
        object.__setattr__(self, "places", places)
        rows, columns = self.rows, self.columns
        tensors = (
            rows.starts, rows.splits, rows.blocks, rows.masks, rows.longest_first,
            columns.starts, columns.splits, columns.blocks, columns.masks, columns.longest_first,
            self.mask_table, self.order, self.places,
        )  # fmt: skip
        object.__setattr__(self, "_tensors", tensors)
        object.__setattr__(self, "_sizes", (self.n_q, self.n_k, self.block_size, int(self.causal)))
        for tensor in tensors:
            _mark_dynamic(tensor)

    @property
    def q_blocks(self) -> int:
        return -(-self.n_q // self.block_size)

    @property
    def k_blocks(self) -> int:
        return -(-self.n_k // self.block_size)

    @property
    def device(self) -> torch.device:
        return self.mask_table.device

    @property
    def kept_blocks(self) -> int:
        """Blocks that are not empty, over all heads that have a pattern of their own."""
        return len(self.rows.blocks) + (0 if self.rest is None else self.rest.kept_blocks)

    @property
    def density(self) -> float:
        """The share of all ``n_q * n_k`` pairs that is kept, exactly; the mean over heads."""
        return self.kept_pairs() / (self.heads * self.n_q * self.n_k)

    def kept_pairs(self) -> int:
        """Pairs of a query and a key that are kept, over all heads that have a pattern of their own. O(kept blocks)."""
        return int(self._pairs_of_blocks().sum()) + (0 if self.rest is None else self.rest.kept_pairs())

    def parts(self) -> list[Layout]:
        """A layout for each order, all without ``rest``, no pair in two of them; the first may be in natural order.

        Attention over each of them, merged by ``merge_attention``, is attention over the whole.
        """
        if self.rest is None:
            return [self]
        return [replace(self, rest=None), *self.rest.parts()]

    def _pairs_of_blocks(self) -> Tensor:
        """Kept pairs of each block in ``rows``, int64 ``(kept,)``."""
        size = self.block_size
        full = torch.full((1, size), size, device=self.device)
        counts = torch.cat([_masks.count_bits(self.mask_table), full])  # [masks + 1, b]; mask -1 is the last
        queries = self.n_q - (self.q_blocks - 1) * size
        counts = torch.stack([counts.sum(1), counts[:, :queries].sum(1)])
        return counts[(self._rows_of_blocks()[1] == self.q_blocks - 1).long(), self.rows.masks]

    def _rows_of_blocks(self) -> tuple[Tensor, Tensor]:
        """Head and block row of each block in ``rows``, int64 ``(kept,)``."""
        starts = self.rows.starts.long()
        line = torch.repeat_interleave(torch.arange(len(starts) - 1, device=self.device), starts.diff())
        head = line // self.q_blocks
        return head, line - head * self.q_blocks

    def __repr__(self) -> str:
        parts = len(self.parts())
        kind = ["causal"] * self.causal + ["permuted"] * bool(self.order.numel())
        kind += [f"{parts} parts"] * (parts > 1) + [str(self.device)]
        return (
            f"Layout({self.n_q} x {self.n_k}, block_size={self.block_size}, heads={self.heads}, "
            f"density={self.density:.3%}, kept_blocks={self.kept_blocks}, {', '.join(kind)})"
        )

    def __or__(self, other: Layout) -> Layout:
        from ._algebra import union

        return union(self, other) if isinstance(other, Layout) else NotImplemented

    def __and__(self, other: Layout) -> Layout:
        from ._algebra import intersection

        return intersection(self, other) if isinstance(other, Layout) else NotImplemented

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # without the mask kept by dense_mask

    def to(self, device: torch.device | str) -> Layout:
        """The layout on a device; itself if it is there already."""
        table = self.mask_table.to(device)
        if table is self.mask_table:
            return self
        rows, columns, order = self.rows.to(device), self.columns.to(device), self.order.to(device)
        rest = None if self.rest is None else self.rest.to(device)
        return replace(self, rows=rows, columns=columns, mask_table=table, order=order, rest=rest)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the kept blocks, full and partial ones apart, heads side by side.

        Args:
            path: a file to write the picture to, in the format that its suffix names; complete or not at all.

        Returns:
            The matplotlib figure. Of a layout with an ``order`` it shows places, as the kernels walk it; of one
            with ``rest``, whose orders differ, positions.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        from ._plot import plot

        return plot(self, path)

    def tensors(self) -> tuple[Tensor, ...]:
        """What the kernels read, in the order in which every launcher unpacks it."""
        return self._tensors

    def sizes(self) -> tuple[int, ...]:
        """What the kernels are told besides: ``n_q``, ``n_k``, ``block_size``, and 1 where the layout is causal."""
        return self._sizes

    def to_mask(self) -> Tensor:
        """The layout as bool ``(heads, n_q, n_k)``, or ``(n_q, n_k)`` where all heads share one. Dense memory."""
        mask = self._expand()
        return mask[0] if self.heads == 1 else mask

    def dense_mask(self) -> Tensor:
        """``to_mask``, always ``(heads, n_q, n_k)``, and kept for the next call: what the reference backend reads."""
        if "_dense" not in self.__dict__:
            object.__setattr__(self, "_dense", self._expand())
        return self.__dict__["_dense"]

    def _expand(self) -> Tensor:
        size, device = self.block_size, self.device
        table = _masks.unpack(self.mask_table, size)  # [masks, b, b]
        table = torch.cat([table, torch.ones(1, size, size, dtype=torch.bool, device=device)])  # mask -1 is the last
        head, row = self._rows_of_blocks()
        tiles = torch.zeros(self.heads, self.q_blocks, self.k_blocks, size, size, dtype=torch.bool, device=device)
        tiles[head, row, self.rows.blocks] = table[self.rows.masks]
        mask = tiles.transpose(2, 3).reshape(self.heads, self.q_blocks * size, self.k_blocks * size)
        mask = mask[:, : self.n_q, : self.n_k]
        if self.order.numel():
            place = self.places.long().expand(self.heads, -1)
            mask = torch.stack([m[p][:, p] for m, p in zip(mask, place)])
        return mask.contiguous() if self.rest is None else mask | self.rest._expand()
