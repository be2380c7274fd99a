"""Cases of models: a forward pass and a training step, on our kernels and in plain PyTorch.

A benchmark of a model names its variants, and then gets two cases for each:

    VARIANTS = (Variant("512 bytes", "12 layers ...", partial(build, config), asked=1.0),)

    def cases(device, quick):
        yield from model_cases.cases(QUICK if quick else VARIANTS, device, quick)

    def bars(results):
        return model_cases.bars(results, VARIANTS)

What runs is the problem of ``python -m models compare``, with its real data. Here one process holds one set of weights,
which all contestants share: plain PyTorch is the very model under ``backend("reference")``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import gdl_kernels
from gdl_kernels._backends import Explanation
from models import report
from models.compare import TOLERANCES, TOLERANCES_WITH_KINKS, Problem, errors, relative_error

from .cases import COMPILED, EAGER, OURS, Case, Contestant, Deferred, Task
from .correctness import Outputs, matched
from .results import Bar, Result

FORWARD, TRAINING = "forward", "training step"

#: Products over all pairs in plain PyTorch's attention: scores and output, and backward two for each of these.
PRODUCTS = {FORWARD: 2, TRAINING: 6}

#: What AdamW alone moves for each weight with a gradient: it reads and writes the weight and two moments, in float32.
ADAMW_BYTES = 6 * 4


@dataclass(frozen=True)
class Variant:
    """A model at one size.

    Attributes:
        name: the size, in the names of its cases.
        about: what else there is to it, for people.
        build: its problem in a dtype, on a device: the same weights and input at every call.
        kinks: whether the gradient jumps, as with ReLUs: see ``models.compare.TOLERANCES_WITH_KINKS``.
        left_out: multiply-adds of one product over all pairs that attention does not need, in all layers together.
        compiles: whether torch.compile competes in the forward pass.
        asked: how many times as fast as eager PyTorch a training step is to be.
        less_memory: whether the step is to need less of it.
    """

    name: str
    about: str
    build: Callable[[torch.dtype, str], Problem]
    kinks: bool = False
    left_out: int = 0
    compiles: bool = True
    asked: float = 1.0
    less_memory: bool = False

    def case_name(self, phase: str) -> str:
        return f"{phase}, {self.name}, fp32"


@dataclass(frozen=True)
class Trial:
    """A problem that runs again and again from one state.

    A pass in training mode moves buffers: the vectors of spectral norms, on which outputs depend, and running
    statistics. Each run first puts them back.
    """

    problem: Problem
    buffers: Sequence[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, problem: Problem) -> Trial:
        return cls(problem, [(buffer, buffer.clone()) for buffer in problem.model.buffers()])

    def forward(self) -> Tensor:
        self._restore()
        with torch.no_grad(), _without_tf32():
            return self.problem.forward()

    def training_step(self, optimizer: Optimizer | None = None) -> tuple[Tensor, ...]:
        """The loss, and the gradient of each parameter that has one."""
        self._restore()
        with _without_tf32():
            loss = self.problem.loss()
            loss.backward()
        if optimizer is not None:
            optimizer.step()
        gradients = [p.grad for p in self.problem.model.parameters() if p.grad is not None]
        self.problem.model.zero_grad()
        return loss.detach(), *gradients

    def _restore(self) -> None:
        for buffer, begin in self.buffers:
            buffer.copy_(begin)


def _without_tf32() -> AbstractContextManager[None]:
    """On a GPU torch's convolutions would take it for float32, and be off by a thousandth."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def cases(variants: Sequence[Variant], device: torch.device, quick: bool) -> Iterator[Deferred]:
    for variant in variants:
        trial = cache(partial(_trial, variant, device))  # one for both, when the first of them is run
        yield Deferred(variant.case_name(FORWARD), partial(_forward_case, variant, trial, device, quick))
        yield Deferred(variant.case_name(TRAINING), partial(_training_case, variant, trial, device))


def _trial(variant: Variant, device: torch.device) -> Trial:
    return Trial.of(variant.build(torch.float32, str(device)))


def bars(results: Sequence[Result], variants: Sequence[Variant]) -> list[Bar]:
    """What is asked of training steps. Of smaller models than ``variants``, as a quick run has them, nothing is."""
    steps = {variant.case_name(TRAINING): variant for variant in variants}
    asked = []
    for result in results:
        variant = steps.get(result.case)
        if variant is None:
            continue
        ours, eager = result.ours, result.row(EAGER)
        asked.append(Bar(f"{result.case}: over {EAGER}", variant.asked, result.speed_up(eager)))
        if variant.less_memory:
            memory = None
            if ours is not None and eager is not None and ours.peak_bytes and eager.peak_bytes:
                memory = eager.peak_bytes / ours.peak_bytes
            asked.append(Bar(f"{result.case}: memory of {EAGER} over ours", 1.0, memory))
    return asked


def _forward_case(variant: Variant, built: Callable[[], Trial], device: torch.device, quick: bool) -> Case:
    trial, rivals = built(), []
    if variant.compiles and not quick:
        # With eager PyTorch's random numbers, or the images would be others.
        compiled = torch.compile(trial.problem.forward, dynamic=False, options={"fallback_random": True})
        rival = replace(trial, problem=replace(trial.problem, forward=compiled))
        rivals.append(Contestant(COMPILED, _plain(rival.forward)))
    return _case(variant, FORWARD, trial, device, trial.forward, Trial.forward, rivals)


def _training_case(variant: Variant, built: Callable[[], Trial], device: torch.device) -> Case:
    trial = built()
    # A step at a rate of 0 costs what any other costs, and leaves the weights as they are.
    optimizer = AdamW(trial.problem.model.parameters(), lr=0.0)
    return _case(variant, TRAINING, trial, device, lambda: trial.training_step(optimizer), Trial.training_step)


def _case(
    variant: Variant,
    phase: str,
    trial: Trial,
    device: torch.device,
    run: Callable[[], Outputs],
    exactly: Callable[[Trial], Outputs],
    rivals: Sequence[Contestant] = (),
) -> Case:
    def truth() -> Outputs:
        return exactly(Trial.of(variant.build(torch.float64, str(device))))

    eager = _plain(run)
    with _Counted() as counted:
        outputs = eager()
    # Of a step the least that can be: activations might all stay in the caches. Of a forward pass not even the weights
    # can be counted on, for it may use a few rows of a table, or none of some layers.
    moved = 0 if isinstance(outputs, Tensor) else ADAMW_BYTES * sum(gradient.numel() for gradient in outputs[1:])
    task = Task(
        _plain(truth),
        eager,
        flops=float(counted.flops - 2 * PRODUCTS[phase] * variant.left_out),
        bytes=float(moved),
        share=_share(*(TOLERANCES_WITH_KINKS if variant.kinks else TOLERANCES)[torch.float32]),
    )
    parameters = report.count(sum(parameter.numel() for parameter in trial.problem.model.parameters()))
    ours = Contestant(OURS, run, explain=lambda: served(trial.problem.explain()))
    return Case(
        name=variant.case_name(phase),
        shape=f"{parameters} parameters, {variant.about}",
        dtype=torch.float32,
        device=device,
        inputs=lambda _: (),  # the problem has its own
        task=task,
        contestants=[Contestant(EAGER, eager), *rivals, ours],
        input_sets=1,
        recorded=False,
    )


class _Counted(TorchDispatchMode):
    """Counts operations by torch's own formulas. Its FlopCounterMode would not let a gradient be differentiated."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _plain(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
    def in_plain_pytorch() -> Outputs:
        with gdl_kernels.backend("reference"):
            return run()

    return in_plain_pytorch


def _share(output: float, gradient: float) -> Callable[[Outputs, Outputs, Outputs], float]:
    """The rule of ``models.compare``: relative errors of the output, or the loss, and of gradients.

    There ours may be off from plain PyTorch by a tolerance. So from float64 it may be off by that, and by as much as
    plain PyTorch is itself: which counts up to the tolerance, or the check would say nothing of plain PyTorch.
    """

    def share(outputs: Outputs, plain: Outputs, truth: Outputs) -> float:
        triples = matched(outputs, plain, truth)
        of_ours, of_plain = (_relative([(triple[i], triple[2]) for triple in triples]) for i in (0, 1))
        shares = [
            error / (tolerance + min(tolerance, plain_error))
            for error, plain_error, tolerance in zip(of_ours, of_plain, (output, gradient))
        ]
        return max(math.inf if math.isnan(share) else share for share in shares)

    return share


def _relative(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """The error of an output, or of a loss and, the largest, of gradients."""
    if len(pairs) == 1:
        return [relative_error(*pairs[0])]
    names = ["output", *map(str, range(1, len(pairs)))]
    of_loss, of_gradients, _ = errors(*({n: pair[i] for n, pair in zip(names, pairs)} for i in (0, 1)))
    return [of_loss, of_gradients]


def served(explanations: Sequence[Explanation]) -> Explanation:
    """A model's ops as one: one that no kernel serves, or else whatever backends were chosen."""
    for explanation in explanations:
        if explanation.verdicts["reference"] == "chosen":
            return explanation
    chosen = {name: verdict for e in explanations for name, verdict in e.verdicts.items() if verdict == "chosen"}
    return Explanation(", ".join(dict.fromkeys(e.op for e in explanations)), chosen)
