"""From the launcher's own choice downhill: the neighbours of the best configuration so far, until none is faster."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gdl_kernels import _tuned
from gdl_kernels._tuned import Tiles
from gdl_kernels.ops.sparse_attention.triton import launch

from ..correctness import Outputs, error_share
from ..timing import Call, Plan, by_turns
from .problems import ORDERS, Problem

#: Milliseconds of each call. All are timed in one run, so that they can be compared.
Clock = Callable[[Sequence[Call]], list[float]]

PLAN = Plan(seconds=1, min_rounds=5, max_rounds=30)

#: A configuration takes another's place if it is faster by more than this, which two runs of one may differ by.
LEAST_GAIN = 0.02


@dataclass(frozen=True)
class Found:
    """The fastest configuration, and what else was tried.

    Attributes:
        ms: of the pass that the kernel is part of, in one run with ``built_in_ms``.
        tried: configurations that were timed.
        skipped: configurations that can't be used, and why.
    """

    tiles: Tiles
    ms: float
    built_in_ms: float
    tried: int
    skipped: dict[Tiles, str]


def gpu_clock(calls: Sequence[Call]) -> list[float]:
    return [statistics.median(samples) for samples in by_turns(calls, PLAN, torch.device("cuda"))]


def search(problem: Problem, clock: Clock) -> Found:
    """The fastest configuration of a problem's kernel that computes the right thing.

    Raises:
        ValueError: if the launcher's own choice doesn't.
    """
    try:
        with _tuned.using(None):
            run, plain, truth = problem.prepared()
    except Exception as error:  # as below
        raise ValueError(f"its own choice {_raised(error)}") from error
    if why := _fault(problem, problem.built_in, run, plain, truth, spills=True):
        raise ValueError(f"its own choice {list(problem.built_in)} {why}")
    best, usable, skipped = problem.built_in, {problem.built_in}, dict[Tiles, str]()
    while True:
        fresh = []
        for tiles in neighbours(best):
            if not problem.allows(tiles) or tiles in usable or tiles in skipped:
                continue
            if why := _fault(problem, tiles, run, plain, truth, spills=False):
                skipped[tiles] = why
            else:
                usable.add(tiles)
                fresh.append(tiles)
        times = dict(zip([best, *fresh], clock([_with(problem, tiles, run) for tiles in [best, *fresh]])))
        fastest = min(times, key=times.__getitem__)
        if times[fastest] >= times[best] * (1 - LEAST_GAIN):
            break
        best = fastest
    ms, built_in_ms = clock([_with(problem, tiles, run) for tiles in (best, problem.built_in)])
    if ms > built_in_ms:  # the steps' gains were noise
        best, ms = problem.built_in, built_in_ms
    return Found(best, ms, built_in_ms, len(usable), skipped)


def neighbours(tiles: Tiles) -> Iterator[Tiles]:
    """Half and twice of each number, of a program's own positions and warps together as well; a stage less and more."""
    own, step, num_stages, num_warps = tiles
    for less, more in ((1, 2), (2, 1)):
        yield tiles._replace(own=own * more // less)
        yield tiles._replace(step=step * more // less)
        yield tiles._replace(num_warps=num_warps * more // less)
        yield tiles._replace(own=own * more // less, num_warps=num_warps * more // less)
    for stages in (num_stages - 1, num_stages + 1):
        yield tiles._replace(num_stages=stages)


def _with(problem: Problem, tiles: Tiles, run: Callable[[], Outputs]) -> Callable[[int], Outputs]:
    table = _tuned.Table({}, {(problem.op, problem.kernel, problem.key): tiles})

    def call(_: int) -> Outputs:
        with _tuned.using(table):
            return run()

    return call


def _fault(
    problem: Problem, tiles: Tiles, run: Callable[[], Outputs], plain: Outputs, truth: Outputs, *, spills: bool
) -> str:
    """Why a configuration can't be used; empty if it can.

    Args:
        spills: whether registers may spill.
    """
    try:
        with _launched() as kernels:
            outputs = _with(problem, tiles, run)(0)
    except Exception as error:  # a compiler or driver may raise anything; the table says what
        return _raised(error)
    _synchronize()
    spilled = max((kernel.n_spills for kernel in kernels if kernel.name == f"_{problem.kernel}"), default=0)
    if spilled and not spills:
        return f"spills {spilled} registers"
    # The terms of second derivatives cancel several times over, where plain PyTorch may be lucky.
    share = error_share(outputs, plain, truth) / (2 if ORDERS[problem.kernel] == 2 else 1)
    return "" if share <= 1 else f"is wrong: its error against float64 is {share:.3g} times what is allowed"


def _raised(error: Exception) -> str:
    """An error in a line. Raises one itself where nothing can be launched any more."""
    _synchronize()
    lines = str(error).strip().splitlines() or ["no message"]
    return f"raises {type(error).__name__}: {lines[-1]}"


@contextmanager
def _launched() -> Iterator[list[Any]]:
    """The kernels that are launched meanwhile; none by the interpreter."""
    kernels: list[Any] = []

    def observe(kernel: Any) -> None:
        if kernel is not None:
            kernels.append(kernel)

    launch.observers.append(observe)
    try:
        yield kernels
    finally:
        launch.observers.remove(observe)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
