"""Packed bit masks of blocks: int32 ``(masks, block_size, ceil(block_size / 32))``, as in ``Layout.mask_table``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Masks hashed at once; bounds the int64 copy that hashing makes to some 4 MB.
_HASHED_AT_ONCE = 4096


def pack(bits: Tensor) -> Tensor:
    """Bool ``(..., block_size)`` to int32 ``(..., ceil(block_size / 32))``."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    octets = (bits.view(torch.uint8).unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return F.pad(octets, (0, -octets.shape[-1] % 4)).view(torch.int32)


def unpack(words: Tensor, block_size: int) -> Tensor:
    """Int32 ``(..., ceil(block_size / 32))`` to bool ``(..., block_size)``."""
    bit = torch.arange(block_size, device=words.device)
    return ((words[..., bit // 32] >> (bit % 32).to(torch.int32)) & 1).bool()


def first_bits(block_size: int, device: torch.device) -> Tensor:
    """Int32 ``(block_size + 1, words)``: row ``n`` has the first ``n`` bits of a block's row set."""
    count = torch.arange(block_size + 1, device=device)
    return pack(count[:-1] < count[:, None])


def count_bits(words: Tensor) -> Tensor:
    """Set bits of each row, int64 ``(...)`` from int32 ``(..., words)``."""
    octets = words.contiguous().view(torch.uint8)
    counts = torch.zeros_like(octets)
    for bit in range(8):
        counts += (octets >> bit) & 1
    return counts.sum(-1, dtype=torch.int64)


def distinct(words: Tensor) -> tuple[Tensor, Tensor]:
    """Masks ``(masks, block_size, words)`` without repeats, and int64 ``(masks,)``: where each of them is now."""
    if len(words) == 0:
        return words, torch.empty(0, dtype=torch.int64, device=words.device)
    # Sorting 64-bit hashes is some 30 times as fast as torch.unique(dim=0), which compares mask by mask.
    flat = words.flatten(1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**63), 2**63 - 1, flat.shape[1:], generator=generator, device="cpu").to(words.device)
    hashes = torch.cat([(part.long() * weights).sum(1) for part in flat.split(_HASHED_AT_ONCE)])
    values, index = torch.unique(hashes, return_inverse=True)
    member = index.new_empty(len(values)).scatter_(0, index, torch.arange(len(index), device=index.device))
    table = flat[member]
    if not torch.equal(table[index], flat):  # two masks share a hash
        table, index = torch.unique(flat, dim=0, return_inverse=True)
    return table.unflatten(1, words.shape[1:]), index
