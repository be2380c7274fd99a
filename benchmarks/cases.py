"""What a benchmark is made of.

A benchmark is one file, ``benchmarks/ops/<op>.py`` or ``benchmarks/models/<model>.py``, or a folder of that name, and
found by it. It has the two functions of :class:`Benchmark`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gdl_kernels._backends import Explanation

from .ceilings import Ceiling, matrix_product
from .correctness import Outputs, error_share

if TYPE_CHECKING:
    from .results import Bar, Result

Inputs = tuple[Tensor, ...]
#: Computes one output or several from a case's inputs.
Function = Callable[..., Tensor | tuple[Tensor, ...]]

#: The contestants that most benchmarks have. Some say more of theirs, as in "eager, masked".
OURS, EAGER, COMPILED = "gdl_kernels", "eager", "torch.compile"


@dataclass(frozen=True)
class Task:
    """What is computed, and how much work that is.

    Attributes:
        truth: the task on inputs that are float64, as the measure of every error.
        plain: the task in plain PyTorch in the inputs' own dtype. Twice its error is allowed, unless ``share`` has
            another rule.
        compared: what of a contestant's output is compared; ``truth`` and ``plain`` give just that. All of it, unless
            the whole truth would take far longer than what is measured.
        share: the error of outputs as a share of what is allowed, from these and what ``plain`` and ``truth`` give; it
            raises a ValueError if they are of another number, shape or dtype.
        flops: floating-point operations that one call needs, however many a contestant executes.
        bytes: memory traffic that one call needs: each input read once, each output written once. Where more is needed
            than can be told, as in a model, the part that can; 0 is none.
    """

    truth: Function
    plain: Function
    flops: float
    bytes: float
    compared: Callable[[Tensor], Tensor] = lambda output: output
    share: Callable[[Outputs, Outputs, Outputs], float] = error_share


@dataclass(frozen=True)
class Contestant:
    """One way to do a case's task.

    Attributes:
        function: called with the case's inputs, or with what ``setup`` makes of them.
        task: given for a yardstick: it computes something else than the case asks, and is checked against that.
        explain: given for ours: ``gdl_kernels.explain`` of the call. Where it says ``reference``, nothing is timed.
        setup: called once for each set of inputs, outside of what is timed: the forward pass, where the backward pass
            is the task.
    """

    name: str
    function: Function
    task: Task | None = None
    explain: Callable[..., Explanation] | None = None
    setup: Callable[..., Inputs] | None = None


@dataclass(frozen=True)
class Case:
    """One task at one size, and who competes at it.

    Attributes:
        name: unique within the op or model.
        shape: the sizes, for people.
        inputs: fresh random inputs, from a generator on ``device``.
        contestants: in the order in which they take turns.
        ceiling: what the machine itself can do; the rate in rows is a share of it.
        growth: the curve of which this case is one point, as "forward over pixels", and its size there. The cases of a
            curve differ in that size and in nothing else.
        input_sets: calls go through this many sets of inputs in turn, so that none finds its inputs where the one
            before left them. More than three where three would stay in the caches.
        recorded: whether on a GPU calls are recorded, and the GPU's part is timed alone. A model's are timed as they
            are called.
    """

    name: str
    shape: str
    dtype: torch.dtype
    device: torch.device
    inputs: Callable[[torch.Generator], Inputs]
    task: Task
    contestants: Sequence[Contestant]
    ceiling: Callable[[torch.dtype, torch.device], Ceiling] = matrix_product
    growth: tuple[str, int] | None = None
    input_sets: int = 3
    recorded: bool = True

    def build(self) -> Case:
        return self


@dataclass(frozen=True)
class Deferred:
    """A case that has a name before it is built, for where building takes time: a model, a mask, a table."""

    name: str
    build: Callable[[], Case]


Candidate = Case | Deferred


class Benchmark(Protocol):
    """What the file of an op or a model offers."""

    def cases(self, device: torch.device, quick: bool) -> Iterator[Candidate]:
        """The cases one by one, named at next to no cost. Each is built when it is run: only one's tensors exist."""

    def bars(self, results: Sequence[Result]) -> list[Bar]:
        """What is asked, beside what was measured."""


def dtypes(device: torch.device, quick: bool) -> tuple[torch.dtype, ...]:
    """What cases are in, what models use on the device first; quick ones are in that alone."""
    both = (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    return both[:1] if quick else both


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
