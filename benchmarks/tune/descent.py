"""From the launcher's own choice downhill: the neighbours of the best configuration so far, until none is faster."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from gdl_kernels import _tuned
from gdl_kernels._tuned import Config, Tunable

from ..correctness import Outputs, error_share
from .passes import Problem, launched

#: Milliseconds of each call. All are timed in one run, so that they can be compared.
Clock = Callable[[Sequence[Callable[[], object]]], list[float]]

#: Rounds of turns go on until so many seconds have passed, within the two limits. A turn repeats its call until it is
#: so long, or so often.
SECONDS, MIN_ROUNDS, MAX_ROUNDS = 1.0, 5, 30
TURN_MS, REPEATS = 5.0, 20

#: Cycles that no GPU has more of in a second.
CYCLES = 2.5e9

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

    config: Config
    ms: float
    built_in_ms: float
    tried: int
    skipped: list[tuple[Config, str]]


def gpu_clock(calls: Sequence[Callable[[], object]]) -> list[float]:
    """The median time of each call on the GPU alone: it first waits, for as long as the host needs to launch a turn.

    Small kernels take less time than their launches do, and would all seem to take the same.
    """
    turns = [_turn(call) for call in calls]
    samples: list[list[float]] = [[] for _ in turns]
    begin = time.perf_counter()
    for round_ in range(MAX_ROUNDS):
        if round_ >= MIN_ROUNDS and time.perf_counter() - begin > SECONDS:
            break
        for turn, sample in zip(turns, samples):
            sample.append(turn())
    return [statistics.median(sample) for sample in samples]


def _turn(call: Callable[[], object]) -> Callable[[], float]:
    """What measures the milliseconds of a call that is warm, as long as a turn is."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    host_seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    ms = _turn_ms(call, 1, host_seconds)
    repeats = min(REPEATS, max(1, math.ceil(TURN_MS / max(ms, 1e-6))))
    return lambda: _turn_ms(call, repeats, host_seconds)


def _turn_ms(call: Callable[[], object], repeats: int, host_seconds: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(math.ceil(1.5 * repeats * host_seconds * CYCLES))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def search(problem: Problem, clock: Clock) -> Found:
    """The fastest configuration of a problem's kernel that computes the right thing.

    Raises:
        ValueError: if the launcher's own choice doesn't.
    """
    why, allowed_spills = _fault(problem, problem.built_in, None)
    if why:
        raise ValueError(f"its own choice {dict(problem.built_in)} {why}")
    tunable, key = problem.tunable, problem.named_key
    best, usable = problem.built_in, [problem.built_in]
    skipped: list[tuple[Config, str]] = []
    while True:
        fresh = []
        for config in neighbours(tunable, best):
            if tunable.fault(key, config) or config in usable or any(config == other for other, _ in skipped):
                continue
            why, _ = _fault(problem, config, allowed_spills)
            if why:
                skipped.append((config, why))
            else:
                usable.append(config)
                fresh.append(config)
        timed = [best, *fresh]
        times = clock([_with(problem, config) for config in timed])
        fastest = min(range(len(timed)), key=times.__getitem__)
        if times[fastest] >= times[0] * (1 - LEAST_GAIN):
            break
        best = timed[fastest]
    ms, built_in_ms = clock([_with(problem, config) for config in (best, problem.built_in)])
    if ms > built_in_ms:  # the steps' gains were noise
        best, ms = problem.built_in, built_in_ms
    return Found(best, ms, built_in_ms, len(usable), skipped)


def neighbours(tunable: Tunable, config: Config) -> Iterator[Config]:
    """The next choice up and down of each number, and of the first, a tile's size, together with the warps."""
    first = next(iter(tunable.choices))
    moves = [(name,) for name in tunable.choices]
    for names in [*moves, *([(first, "num_warps")] if first != "num_warps" else [])]:
        for step in (-1, 1):
            places = {name: tunable.choices[name].index(config[name]) + step for name in names}
            if all(0 <= place < len(tunable.choices[name]) for name, place in places.items()):
                yield {**config, **{name: tunable.choices[name][place] for name, place in places.items()}}


def _with(problem: Problem, config: Config) -> Callable[[], Outputs]:
    table = _tuned.Table({}, {problem.key: config})

    def call() -> Outputs:
        with _tuned.using(table):
            return problem.run()

    return call


def _fault(problem: Problem, config: Config, allowed_spills: int | None) -> tuple[str, int]:
    """Why a configuration can't be used, empty if it can; and how many registers the pass's kernels spill.

    Args:
        allowed_spills: how many may; None for any number.
    """
    try:
        with launched() as kernels:
            outputs = _with(problem, config)()
        synchronize()
    except Exception as error:  # a compiler or driver may raise anything; the table says what
        return raised(error), 0
    spills = sum(kernel.n_spills for kernel in kernels)
    if allowed_spills is not None and spills > allowed_spills:
        return f"spills {spills} registers", spills
    # The terms of second derivatives cancel several times over, where plain PyTorch may be lucky.
    share = error_share(outputs, problem.plain, problem.truth) / (2 if problem.of.order == 2 else 1)
    return "" if share <= 1 else f"is wrong: its error against float64 is {share:.3g} times what is allowed", spills


def raised(error: Exception) -> str:
    """An error in a line. Raises one itself where nothing can be launched any more."""
    synchronize()
    lines = str(error).strip().splitlines() or ["no message"]
    return f"raises {type(error).__name__}: {lines[-1]}"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
