"""The forward pass over the patterns, lengths and sizes of the Sparse Transformer, against FlexAttention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch

from ...cases import Deferred, short
from ...results import Bar, Result, geometric_mean
from .patterns import Pattern, causal, fixed, local, strided
from .problem import FLEX, Problem, Size

#: Of longer sequences and larger batches so many rows are compared with float64, which takes some seconds there.
CHECKED_ROWS = 256

# FlexAttention has our block size, which is its best one as well: on two cores of a Xeon at 2.8 GHz it takes, for
# `fixed` with its 32 summary columns, 2.2 times as long in blocks of 64 as in blocks of 32, and 4.2 times in 128.
LOCAL, FIXED, STRIDED, DENSE = local(1024), fixed(128, 32), strided(128), causal()
#: Pattern, block size, and sizes: batch, heads, positions, head_dim. docs/benchmarks.md says what is left out, and why.
ROWS: Sequence[tuple[Pattern, int, Sequence[Size]]] = (
    (LOCAL, 128, [Size(1, 8, n, 64) for n in (4096, 12_288, 16_384, 65_536)]),
    (LOCAL, 64, [Size(1, 8, n, 64) for n in (4096, 65_536)]),
    (FIXED, 32, [Size(1, 8, n, 64) for n in (4096, 12_288, 16_384)]),
    (FIXED, 64, [Size(1, 8, 4096, 64)]),
    (STRIDED, 128, [Size(1, 8, n, 64) for n in (4096, 12_288, 16_384)]),
    (DENSE, 128, [Size(1, 8, n, 64) for n in (4096, 12_288, 16_384)]),
    # What many heads, many samples and wide heads change shows at the shortest length.
    (LOCAL, 128, [Size(1, 16, 4096, 64), Size(8, 8, 4096, 64), Size(1, 8, 4096, 128), Size(8, 16, 4096, 128)]),
    (FIXED, 32, [Size(1, 16, 4096, 64), Size(8, 8, 4096, 64), Size(1, 8, 4096, 128)]),
    (STRIDED, 128, [Size(1, 8, 4096, 128)]),
    (DENSE, 128, [Size(8, 8, 4096, 64), Size(1, 8, 4096, 128)]),
)


def cases(device: torch.device) -> Iterator[Deferred]:
    for pattern, block_size, sizes in ROWS:
        for size in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                yield case(pattern, size, dtype, block_size, device)


def case(pattern: Pattern, size: Size, dtype: torch.dtype, block_size: int, device: torch.device) -> Deferred:
    checked = CHECKED_ROWS if size.batch * size.positions > 4096 else None
    problem = Problem(pattern, size, dtype, block_size, device, checked_rows=checked)
    return problem.case(f"grid, {pattern.name}, {size}", lambda: [problem.flex(), problem.ours()])


def bars(results: Sequence[Result]) -> list[Bar]:
    """Over the grid's rows as a whole; nothing where none was run."""
    rows = [result for result in results if result.case.startswith("grid,")]
    asked = []
    for dtype, mean in ((torch.float32, 3.0), (torch.bfloat16, 5.0)):
        ratios = {
            row.case: row.speed_up(row.row(FLEX))
            for row in rows
            if row.dtype == str(dtype).removeprefix("torch.") and _has_rival(row)
        }
        asked += [
            Bar(f"grid, {short(dtype)}, geometric mean of {len(ratios)} rows: over {FLEX}", mean, _mean(ratios)),
            _least(f"grid, {short(dtype)}", f"over {FLEX}", 1.5, ratios),
        ]
    for block_size, share in ((128, 0.75), (64, 0.60)):
        shares = {
            row.case: row.share_of_ceiling(row.ours) for row in rows if row.case.endswith(f"blocks of {block_size}")
        }
        asked.append(_least(f"grid, blocks of {block_size}", "of the matrix rate", share, shares, "%"))
    return asked if rows else []


def _has_rival(row: Result) -> bool:
    rival = row.row(FLEX)
    return rival is not None and rival.status == "timed"


def _mean(ratios: Mapping[str, float | None]) -> float | None:
    """None if one of them is: a row in which ours has no time must not flatter the mean by its absence."""
    measured = [ratio for ratio in ratios.values() if ratio is not None]
    return geometric_mean(measured) if len(measured) == len(ratios) else None


def _least(
    claim: str, what: str, asked: float, values: Mapping[str, float | None], unit: Literal["×", "%"] = "×"
) -> Bar:
    """The smallest of the rows, and which one that is; not measured if one of them isn't."""
    measured = {name: value for name, value in values.items() if value is not None}
    if not measured or len(measured) < len(values):
        return Bar(f"{claim}, every row: {what}", asked, None, unit)
    name = min(measured, key=measured.__getitem__)
    return Bar(f"{claim}, every row: {what} (least: {name.removeprefix('grid, ')})", asked, measured[name], unit)
