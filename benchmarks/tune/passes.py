"""What is tuned: the kernels that a pass over a model's shape launches, each at the key that it looks up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdl_kernels import _tuned
from gdl_kernels._tuned import Config, Key, Tunable

from ..correctness import Outputs, tuple_of

#: Called with the inputs and a backend.
Function = Callable[..., Any]


@dataclass(frozen=True)
class Pass:
    """A pass of an op over one shape: forward, backward or double backward.

    Attributes:
        order: of the derivative that it computes; 0 is the output.
        shape: for people.
        inputs: those that are floating point are differentiated, and turned to float64 for the truth.
    """

    op: str
    order: int
    shape: str
    function: Function
    inputs: Callable[[], Iterable[Tensor]]

    def __str__(self) -> str:
        return f"{self.op}, {('forward', 'backward', 'double backward')[self.order]}, {self.shape}"


@dataclass(frozen=True)
class Problem:
    """One row of the table to fill.

    Attributes:
        built_in: what the launcher chooses by itself.
        run: the pass that launches the kernel, by whatever table is in use.
        plain, truth: what plain PyTorch gives for it in the same dtype and in float64.
    """

    key: Key
    of: Pass
    built_in: Config
    run: Callable[[], Outputs]
    plain: Outputs
    truth: Outputs

    def __str__(self) -> str:
        return f"{self.key[1]} of {self.of}"

    @property
    def tunable(self) -> Tunable:
        op, kernel, _ = self.key
        return _tuned.tunables()[op][kernel]

    @property
    def named_key(self) -> dict[str, int]:
        return dict(zip(self.tunable.keys, self.key[2]))


def problems(of: Pass, known: set[Key]) -> list[Problem]:
    """A problem for each kernel that a pass looks up and that isn't among the known ones."""
    inputs = list(of.inputs())
    seed = int(torch.randint(2**31, ()))

    def by(backend: str, dtype: torch.dtype) -> Callable[[], Outputs]:
        generator = torch.Generator(inputs[0].device).manual_seed(seed)
        function = functools.partial(of.function, backend=backend)
        given = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        return derivative(function, given, of.order, generator)

    dtype = next(x.dtype for x in inputs if x.is_floating_point())
    with _tuned.using(None):
        run = by("triton", dtype)
        with _looked_up() as found:
            run()
    fresh = {key: built_in for key, built_in in found.items() if key[0] == of.op and key not in known}
    if not fresh:
        return []
    plain, truth = by("reference", dtype)(), by("reference", torch.float64)()
    return [Problem(key, of, built_in, run, plain, truth) for key, built_in in fresh.items()]


def derivative(
    function: Function, inputs: list[Tensor], order: int, generator: torch.Generator
) -> Callable[[], Outputs]:
    """A call of the function, or of the pass that gives its first or second derivatives, their graph built beforehand.

    What derivatives are multiplied by is drawn from ``generator``.
    """
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    if order == 0:  # with what a backward pass would need, as in training
        return lambda: tuple(output.detach() for output in tuple_of(function(*inputs)))
    leaves = [x for x in inputs if x.requires_grad]
    results = tuple_of(function(*inputs))
    if order == 2:
        cotangents = [_drawn_like(x, generator).requires_grad_() for x in results]
        results = torch.autograd.grad(results, leaves, cotangents, create_graph=True)
        leaves += cotangents
    last = [_drawn_like(x, generator) for x in results]
    # A gradient may be no function of a leaf, as that of a sum isn't of what is added.
    return lambda: torch.autograd.grad(results, leaves, last, retain_graph=True, materialize_grads=True)


def _drawn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """The same numbers in every dtype: those that half precision has."""
    return torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x)


@contextmanager
def _looked_up() -> Iterator[dict[Key, Config]]:
    """What is looked up meanwhile, and the launchers' own choices."""
    found: dict[Key, Config] = {}
    _tuned.observers.append(found.setdefault)
    try:
        yield found
    finally:
        _tuned.observers.pop()


@contextmanager
def launched() -> Iterator[list[Any]]:
    """The kernels that are launched meanwhile, as Triton compiled them; none by the interpreter."""
    from gdl_kernels import _triton  # which can be imported where Triton is installed

    kernels: list[Any] = []

    def observe(kernel: Any) -> None:
        if kernel is not None:
            kernels.append(kernel)

    _triton.observers.append(observe)
    try:
        yield kernels
    finally:
        _triton.observers.remove(observe)
