"""Times calls whose kernels have next to nothing to do. No time fails: the table at the end says which bars are met."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .calls import OURS, TORCHS, Call, seconds
from .conftest import FORWARD, FORWARD_BACKWARD, MEASURED, WITH_GRADIENT, Measured

Time = Callable[..., None]

pytestmark = pytest.mark.parametrize("name", [*TORCHS, *OURS])


#: A machine that is shared is at one speed now and at another in a second: a call and its kernel are timed by turns.
TURNS = 20


@pytest.fixture
def time(request: pytest.FixtureRequest, benchmark: Any, name: str) -> Time:
    """``time(what, run)``, and with a call also its kernel."""

    def timed(what: str, run: Callable[[], Any], call: Call | None = None) -> None:
        benchmark.group = what
        benchmark(run)
        if benchmark.stats is None:  # with --benchmark-disable
            return
        kernel = None if call is None else call.kernel
        whole, inside = benchmark.stats.stats.min, math.inf
        for _ in range(TURNS):
            whole = min(whole, seconds(run))
            inside = min(inside, kernel(run)) if kernel is not None else inside
        measured = Measured(whole, None if kernel is None else inside)
        benchmark.extra_info |= measured._asdict()
        request.config.stash[MEASURED].setdefault(name, {})[what] = measured

    return timed


def made(name: str, gradient: bool) -> Call:
    call = (OURS | TORCHS)[name](gradient)
    if gradient and not call.inputs:
        pytest.skip(f"{name} has nothing to differentiate by")
    return call


@torch.no_grad()
def test_forward(name: str, time: Time) -> None:
    call = made(name, gradient=False)
    time(FORWARD, call.run, call)


def test_forward_with_a_gradient(name: str, time: Time) -> None:
    call = made(name, gradient=True)
    assert outputs(call)[0].requires_grad
    time(WITH_GRADIENT, call.run, call)


def test_forward_and_backward(name: str, time: Time) -> None:
    call = made(name, gradient=True)
    grads = [torch.ones_like(out) for out in outputs(call)]
    time(FORWARD_BACKWARD, lambda: torch.autograd.grad(outputs(call), call.inputs, grads))


def outputs(call: Call) -> list[Tensor]:
    out = call.run()
    return [out] if isinstance(out, Tensor) else list(out)
