"""Times calls whose kernels have next to nothing to do. No time fails: the table at the end says which bars are met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .calls import OURS, TORCHS, Call
from .conftest import FORWARD, FORWARD_BACKWARD, MEASURED, WITH_GRADIENT, Measured

Time = Callable[..., None]

pytestmark = pytest.mark.parametrize("name", [*TORCHS, *OURS])


@pytest.fixture
def time(request: pytest.FixtureRequest, benchmark: Any, name: str) -> Time:
    """``time(what, run)``, and with a call also its kernel."""

    def timed(what: str, run: Callable[[], Any], call: Call | None = None) -> None:
        benchmark.group = what
        benchmark(run)
        kernel = None if call is None or call.kernel is None else call.kernel(run)
        if benchmark.stats is not None:  # not so with --benchmark-disable
            benchmark.extra_info["kernel"] = kernel
            measured = Measured(benchmark.stats.stats.min, kernel)
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
