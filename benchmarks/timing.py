"""Times calls by turns, so that what the machine does meanwhile happens to all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

#: ``call(i)`` runs the contestant on the i-th input set.
Call = Callable[[int], object]

#: A turn repeats its call until it is this long: far above the resolution of the clock and the cost of reading it.
TURN_MS = 10.0


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds go on until ``seconds`` have passed, within the two limits."""

    seconds: float
    min_rounds: int
    max_rounds: int


QUICK = Plan(seconds=0.5, min_rounds=3, max_rounds=30)
FULL = Plan(seconds=10, min_rounds=5, max_rounds=100)


def by_turns(calls: Sequence[Call], plan: Plan, device: torch.device) -> list[list[float]]:
    """Milliseconds of each call, one sample a round; a round gives every call one turn: A B C A B C ...

    Each call has to be warm: compiled, and run before. Within a turn and from round to round the input set moves on.
    The first round finds out how often a turn repeats its call; it counts for those that are a turn by themselves.
    """
    begin = time.perf_counter()
    firsts = [turn_ms(call, 0, 1, device) for call in calls]
    repeats = [max(1, math.ceil(TURN_MS / max(first, 1e-6))) for first in firsts]
    samples = [[first] if count == 1 else [] for first, count in zip(firsts, repeats)]
    for round_ in range(1, plan.max_rounds):
        if round_ >= plan.min_rounds and time.perf_counter() - begin > plan.seconds:
            break
        for call, count, sample in zip(calls, repeats, samples):
            sample.append(turn_ms(call, round_ * count, count, device))
    return samples


def turn_ms(call: Call, first: int, count: int, device: torch.device) -> float:
    """Milliseconds a call, of ``count`` from the ``first`` set of inputs on."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(first, first + count):
            call(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count
    begin = time.perf_counter()
    for i in range(first, first + count):
        call(i)
    return (time.perf_counter() - begin) * 1e3 / count
