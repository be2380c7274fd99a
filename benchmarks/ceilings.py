"""What the machine itself can do, measured in the same run as the contestants."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Columns of the matrix that is read. On two cores of a Xeon the fastest of 256 to 4096: at best 27 GB/s, torch.sum 19.
READ_COLUMNS = 1024


@dataclass(frozen=True)
class Ceiling:
    """A rate to compare with: of arithmetic where ``flops`` is given, of memory traffic where ``bytes`` is."""

    name: str
    call: Callable[[], Tensor]
    flops: float = 0.0
    bytes: float = 0.0


def matrix_product(dtype: torch.dtype, device: torch.device) -> Ceiling:
    """torch's own product of two large square matrices, of the dtype or, where that is faster, of float32."""
    size = 8192 if device.type == "cuda" else 2048  # fills an H200; takes 0.1 s on two CPU cores
    if device.type == "cpu" and dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        dtype = torch.float32  # such a CPU multiplies bfloat16 at a third of that rate
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return Ceiling(f"torch.mm {size}³, {str(dtype).removeprefix('torch.')}", lambda: left @ right, flops=2.0 * size**3)


def memory_read(count: int, sets: int) -> Callable[[torch.dtype, torch.device], Ceiling]:
    """Reading ``count`` bytes once, each call the next of ``sets`` such stretches of memory."""

    def ceiling(dtype: torch.dtype, device: torch.device) -> Ceiling:
        # Of torch's ways to read memory and write next to nothing, the product with a vector is the fastest.
        rows = max(1, round(count / (4 * READ_COLUMNS)))
        stretches = torch.randn(sets, rows, READ_COLUMNS, device=device)
        vector = torch.randn(READ_COLUMNS, device=device)
        turn = itertools.cycle(stretches)
        return Ceiling(f"read of {count / 1e6:.3g} MB", lambda: next(turn) @ vector, bytes=stretches[0].nbytes)

    return ceiling


def memory_copy(count: int, sets: int) -> Callable[[torch.dtype, torch.device], Ceiling]:
    """Copying ``count`` bytes, each call from the next of ``sets`` such stretches of memory into another of them."""

    def ceiling(dtype: torch.dtype, device: torch.device) -> Ceiling:
        stretches = torch.ones(sets, count, dtype=torch.uint8, device=device)
        # Into one that was read a while ago, which will be read again in a while.
        turn = itertools.cycle([(stretches[i], stretches[(i + sets // 2) % sets]) for i in range(sets)])

        def copy() -> Tensor:
            source, target = next(turn)
            return target.copy_(source)

        return Ceiling(f"copy of {count / 1e6:.3g} MB", copy, bytes=2.0 * count)

    return ceiling
