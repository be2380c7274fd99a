"""Orthogonal regularisation of BigGAN-128: the penalty and its gradient, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

import gdl_kernels
from gdl_kernels.ops.orthogonal_regularization import reference

from ..biggan import DISCRIMINATOR, GENERATOR, elements
from ..cases import COMPILED, OURS, Case, Contestant, Inputs, Task
from ..results import Bar, Result

EAGER, CLOSED = "eager, autograd", "eager, closed form"
#: A Gram matrix of the larger side is up to 24,576 x 24,576: eager PyTorch is timed on it only where it is small.
MOST = 4096

Shapes = list[tuple[int, int]]
Penalty = Callable[[Sequence[Tensor]], Tensor]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    small = [shape for shape in GENERATOR if shape[0] * shape[1] <= 2**18]
    lists = {"G-128": GENERATOR, "D-128": DISCRIMINATOR, "small of G-128": small}
    some = ["D-128", "small of G-128"] if device.type == "cuda" else ["small of G-128"]
    for name in some if quick else lists:
        yield case(device, name, lists[name], "rows", quick=quick)
    for name, shapes in lists.items():
        if not quick or name.startswith("small"):
            smaller = [s for s in shapes if max(s) <= MOST]
            yield case(device, f"{name}, sides up to {MOST}", smaller, "columns", quick=quick)


def case(
    device: torch.device, name: str, shapes: Shapes, gram: Literal["columns", "rows"], *, quick: bool = False
) -> Case:
    """Quick without torch.compile, which takes longer than all that is measured."""
    columns = gram == "columns"

    def inputs(generator: torch.Generator) -> Inputs:
        # As large as orthogonal initialisation makes them.
        return tuple(torch.randn(shape, generator=generator, device=device) / max(shape) ** 0.5 for shape in shapes)

    eager = partial(reference.orthogonal_regularization, beta=1e-4, columns=columns)
    ours = partial(gdl_kernels.orthogonal_regularization, gram=gram)
    task = Task(
        truth=_step(partial(_by_smaller_side, columns=columns)),
        plain=_step(eager),
        # Half of the smaller Gram matrix, and its product with the weight.
        flops=sum(3.0 * min(shape) ** 2 * max(shape) for shape in shapes),
        bytes=2 * 4 * elements(shapes),
    )
    contestants = [
        Contestant(EAGER, task.plain),
        Contestant(CLOSED, partial(_closed_form, columns=columns)),
        *([] if quick else [Contestant(COMPILED, _step(torch.compile(eager)))]),
        Contestant(
            OURS, _step(ours), explain=lambda *w: gdl_kernels.explain("orthogonal_regularization", list(w), gram=gram)
        ),
    ]
    return Case(
        f"{name}, Gram of {gram}", f"{len(shapes)} weights, {elements(shapes) / 1e6:.1f} M elements", torch.float32,
        device, inputs, task, contestants, input_sets=2 if elements(shapes) > 2**22 else 3,
    )  # fmt: skip


def _step(penalty: Penalty) -> Callable[..., tuple[Tensor, ...]]:
    def step(*weights: Tensor) -> tuple[Tensor, ...]:
        leaves = [weight.detach().requires_grad_() for weight in weights]
        value = penalty(leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return step


def _closed_form(*weights: Tensor, columns: bool) -> tuple[Tensor, ...]:
    """Without autograd, which multiplies by both factors of the Gram matrix: what a careful user writes by hand."""
    total, grads = weights[0].new_zeros(()), []
    for weight in weights:
        gram = weight.mT @ weight if columns else weight @ weight.mT
        gram.diagonal().zero_()
        total += gram.square().sum()
        grads.append((weight @ gram if columns else gram @ weight).mul_(4e-4))
    return total.mul_(1e-4), *grads


def _by_smaller_side(weights: Sequence[Tensor], columns: bool) -> Tensor:
    """The truth in float64, in a time that can be waited for."""
    total = weights[0].new_zeros(())
    for weight in weights:
        high = weight.shape[0] > weight.shape[1]
        gram = weight.mT @ weight if high else weight @ weight.mT
        of_rows = columns == high
        subtracted = gram.diagonal() if of_rows else weight.square().sum(1 if high else 0)
        total = total + gram.square().sum() - subtracted.square().sum()
    return 1e-4 * total


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        on_gpu = result.ours is not None and result.ours.backend == "triton"
        least = 3.0 if on_gpu else 1.8
        asked.append(Bar(f"{result.case}: over {EAGER}", least, result.speed_up(result.row(EAGER))))
    return asked
