"""The data structure behind every layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """

    starts: Tensor
    splits: Tensor
    blocks: Tensor
    masks: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Which keys each query may see.

    Attributes:
        n_q, n_k: numbers of queries and keys.
        block_size: 16, 32, 64 or 128.
        heads: how many heads have a pattern of their own; 1 when all share one.
        causal: whether no query sees a later key.
        rows: kept block columns of each block row, for the forward pass and the gradient of the queries.
        columns: kept block rows of each block column, for the gradients of keys and values.
        mask_table: int32 ``(masks, block_size, ceil(block_size / 32))``. Bit ``j % 32`` of word ``[m, i, j // 32]`` says
            whether row ``i`` of a partial block with mask ``m`` keeps column ``j``. Distinct masks are stored once.
            Keys past ``n_k`` are never kept, so a block of the last columns is partial unless ``n_k`` fills it. Rows past
            ``n_q`` do not exist: their bits mean nothing, and a kernel never reads them.
        order: int32 ``(heads, n)`` or ``(1, n)``: blocks are blocks of *places*, and place ``p`` of head ``h`` holds query
            and key ``order[h, p]``. Empty, ``(0, 0)``, when places are positions.
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

    @property
    def q_blocks(self) -> int:
        return -(-self.n_q // self.block_size)

    @property
    def k_blocks(self) -> int:
        return -(-self.n_k // self.block_size)

    @property
    def device(self) -> torch.device:
        return self.mask_table.device

    def tensors(self) -> list[Tensor]:
        """What the kernels read, in the order in which every launcher unpacks it."""
        rows, columns = self.rows, self.columns
        return [
            rows.starts, rows.splits, rows.blocks, rows.masks,
            columns.starts, columns.splits, columns.blocks, columns.masks,
            self.mask_table, self.order,
        ]  # fmt: skip

    def to_mask(self) -> Tensor:
        """The layout as bool ``(heads, n_q, n_k)``, or ``(n_q, n_k)`` where all heads share one. O(n_q * n_k) memory."""
        mask = self.dense_mask()
        return mask[0].clone() if self.heads == 1 else mask.clone()

    def dense_mask(self) -> Tensor:
        """``to_mask``, always ``(heads, n_q, n_k)``, and kept for the next call: what the reference backend reads."""
        if "_dense" not in self.__dict__:
            object.__setattr__(self, "_dense", self._expand())
        return self.__dict__["_dense"]

    def _expand(self) -> Tensor:
        size, device = self.block_size, self.device
        bit = torch.arange(size, device=device)
        table = ((self.mask_table[:, :, bit // 32] >> (bit % 32).to(torch.int32)) & 1).bool()  # [masks, b, b]
        table = torch.cat([table, torch.ones(1, size, size, dtype=torch.bool, device=device)])  # mask -1 is the last
        starts = self.rows.starts.long()
        line = torch.repeat_interleave(torch.arange(len(starts) - 1, device=device), starts.diff())
        head, row = line // self.q_blocks, line % self.q_blocks
        tiles = torch.zeros(self.heads, self.q_blocks, self.k_blocks, size, size, dtype=torch.bool, device=device)
        tiles[head, row, self.rows.blocks.long()] = table[self.rows.masks.long()]
        mask = tiles.transpose(2, 3).reshape(self.heads, self.q_blocks * size, self.k_blocks * size)
        mask = mask[:, : self.n_q, : self.n_k]
        if self.order.numel():
            place = torch.argsort(self.order.long(), dim=1).expand(self.heads, -1)
            mask = torch.stack([m[p][:, p] for m, p in zip(mask, place)])
        return mask.contiguous()
