"""Block-sparse attention, against PyTorch's ways to the same result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ...cases import Contestant, Deferred, dtypes
from ...results import Bar, Result, curve, exponent
from . import decode, grid
from .patterns import causal, local, local_and_every_fourth_block
from .problem import BACKWARD, EAGER, FLEX, FORWARD, SDPA, TRAINING, Mode, Problem, Size

SIZE = Size(1, 8, 4096, 64)
#: A GPU would be done with that before the next is launched.
GPU_SIZE = Size(2, 16, 8192, 128)
WINDOW = 512
GROWTH = "forward, local over positions"


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    """Part by part; a case's name begins with its part's. Quick is a case or a few of each, and none of the grid."""
    quick_sizes = (128,) if device.type == "cuda" else (64,)
    for mode in (FORWARD, TRAINING) if quick else (FORWARD, TRAINING, BACKWARD):
        for block_size in quick_sizes if quick else (64, 128):
            for dtype in dtypes(device, quick):
                yield case(device, dtype, block_size, mode, quick=quick)
    for mode in (FORWARD,) if quick else (FORWARD, TRAINING):
        for head_dim in quick_sizes if quick else (64, 128):
            for dtype in dtypes(device, quick):
                yield dense_case(device, dtype, mode, head_dim, quick=quick)
    yield from decode.cases(device, quick)
    for positions in (2048, 8192) if quick else (4096, 8192, 16_384, 32_768):
        yield growth_case(device, positions)
    yield from decode.growth_cases(device, quick)
    if not quick:
        yield from grid.cases(device)


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        part = result.case.partition(",")[0]
        if part == FORWARD.name:
            over_flex = 5.0 if result.dtype == "bfloat16" else 3.0
            of_products = 0.75 if result.case.endswith("128") else 0.60
            asked += [
                Bar(f"{result.case}: over {FLEX}", over_flex, result.speed_up(result.row(FLEX))),
                Bar(f"{result.case}: of the matrix rate", of_products, result.share_of_ceiling(result.ours), "%"),
            ]
        elif part == TRAINING.name:
            asked.append(Bar(f"{result.case}: over {EAGER}", 4.0, result.speed_up(result.row(EAGER))))
        elif part == BACKWARD.name:
            share = result.share_of_ceiling(result.ours)
            asked.append(Bar(f"{result.case}: of the matrix rate", 0.5, share, "%"))
        elif part == "dense causal":
            asked.append(Bar(f"{result.case}: over {SDPA}", 1.0, result.speed_up(result.row(SDPA))))
    points = curve(results, GROWTH)
    if points:
        # "Linear" leaves room for what a fit through page-sized steps of resident memory is off by.
        memory = exponent((n, row.peak_bytes) for n, result in points if (row := result.ours))
        asked.append(Bar("forward, local: memory grows as positions to the power", 1.1, memory, "", at_most=True))
    return [*asked, *decode.bars(results), *grid.bars(results)]


def case(device: torch.device, dtype: torch.dtype, block_size: int, mode: Mode, *, quick: bool) -> Deferred:
    """The passes of a mode over a pattern that keeps 22 % of the blocks."""
    pattern = local_and_every_fourth_block(WINDOW, block_size)
    # Every score of eager's training takes seconds: half the positions are a quarter of that.
    size = _size(device)
    if quick and mode is TRAINING:
        size = replace(size, positions=size.positions // 2)
    problem = Problem(pattern, size, dtype, block_size, device, mode)

    def contestants() -> Iterator[Contestant]:
        if mode is TRAINING or (mode is FORWARD and not quick):
            yield problem.eager()
        if mode is FORWARD or device.type == "cuda":  # on the CPU it has no backward pass
            yield problem.flex(tuned=not quick)
        if not quick:
            yield from problem.sdpa_masked()
        if mode is FORWARD or not quick:
            yield problem.sdpa_yardstick()
        yield problem.ours()

    return problem.case(mode.name, lambda: list(contestants()))


def dense_case(device: torch.device, dtype: torch.dtype, mode: Mode, head_dim: int, *, quick: bool) -> Deferred:
    """At no sparsity, against the kernel that torch has for just that."""
    problem = Problem(causal(), replace(_size(device), head_dim=head_dim), dtype, 128, device, mode)
    kernels = slice(1) if quick else slice(None)
    return problem.case(
        f"dense causal, {mode.name}, d{head_dim}", lambda: [*problem.sdpa_dense()[kernels], problem.ours()]
    )


def _size(device: torch.device) -> Size:
    return GPU_SIZE if device.type == "cuda" else SIZE


def growth_case(device: torch.device, positions: int) -> Deferred:
    """One point of the curve that shows how memory grows with the number of positions."""
    size = Size(SIZE.batch, SIZE.heads, positions, SIZE.head_dim)
    problem = Problem(local(WINDOW), size, torch.float32, 64, device)
    return problem.case(f"growth, forward, local, n {positions}", lambda: [problem.ours()], growth=(GROWTH, positions))
