"""Orthogonalising the weights of BigGAN-128, against the same iteration in a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import gdl_kernels
from gdl_kernels.ops.orthogonalize import reference

from ..biggan import GENERATOR, elements
from ..cases import COMPILED, OURS, Case, Contestant, Inputs, Task
from ..results import Bar, Result

EAGER = "eager, a loop"

#: Large, small, wide and high; the two largest kinds are left out, for whose truth the CPU would take minutes.
MIXED = [shape for shape in GENERATOR if shape[0] * shape[1] <= 6_000_000]
#: A hundred small ones of several shapes.
SMALL = [(24, 192), (96, 192), (12, 96), (48, 96), (64, 64)] * 20


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for steps in (None,) if quick else (None, 7):
        yield case(device, "100 small", SMALL, steps)
        if not quick:
            yield case(device, "mixed", MIXED, steps)


def case(device: torch.device, name: str, shapes: list[tuple[int, int]], steps: int | None) -> Case:
    def inputs(generator: torch.Generator) -> Inputs:
        return tuple(torch.randn(shape, generator=generator, device=device) for shape in shapes)

    eager = _loop(partial(reference.orthogonalize, steps=steps, method="polar"))

    def ours(*weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(gdl_kernels.orthogonalize(weights, steps=steps))

    # As it is written, each step is two products of the weight's size and one small one.
    counted = 10 if steps is None else steps
    task = Task(
        truth=eager,
        plain=eager,
        flops=sum(counted * (4.0 * min(s) ** 2 * max(s) + 2.0 * min(s) ** 3) for s in shapes),
        bytes=2 * 4 * elements(shapes),
    )
    contestants = [Contestant(EAGER, eager)]
    if steps is not None:
        compiled = torch.compile(partial(reference.orthogonalize, steps=steps, method="polar"), dynamic=True)
        contestants.append(Contestant(COMPILED, _loop(compiled)))
    contestants.append(
        Contestant(OURS, ours, explain=lambda *w: gdl_kernels.explain("orthogonalize", list(w), steps=steps))
    )
    return Case(
        f"{name}, steps={steps}", f"{len(shapes)} weights, {elements(shapes) / 1e6:.1f} M elements", torch.float32,
        device, inputs, task, contestants, input_sets=2,
    )  # fmt: skip


def _loop(one: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *weights: tuple(one(weight) for weight in weights)


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        on_gpu = result.ours is not None and result.ours.backend == "cuda"
        least = 5.0 if on_gpu and "small" in result.case else 1.5
        asked.append(Bar(f"{result.case}: over {EAGER}", least, result.speed_up(result.row(EAGER))))
    return asked
