"""Times calls whose kernels have next to nothing to do. No time fails: the table at the end says which bars are met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .calls import OURS, TORCHS, Call
from .conftest import FORWARD, FORWARD_BACKWARD, KERNEL, MEASURED, WITH_GRADIENT

CALLS = pytest.mark.parametrize("name", [*TORCHS, *OURS])


def timed(request: pytest.FixtureRequest, benchmark: Any, name: str, what: str, run: Callable[[], Any]) -> None:
    benchmark.group = what
    benchmark(run)
    if benchmark.stats is not None:  # so with --benchmark-disable
        request.config.stash[MEASURED].setdefault(name, {})[what] = benchmark.stats.stats.min


def made(name: str, gradient: bool) -> Call:
    return (OURS | TORCHS)[name](gradient)


@CALLS
def test_forward(name: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    call = made(name, gradient=False)
    with torch.no_grad():
        timed(request, benchmark, name, FORWARD, call.run)
        if call.kernel is not None:
            seconds = call.kernel(call.run)
            benchmark.extra_info[KERNEL] = seconds
            request.config.stash[MEASURED].setdefault(name, {})[KERNEL] = seconds


@CALLS
def test_forward_with_a_gradient(name: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    call = made(name, gradient=True)
    if not call.inputs:
        pytest.skip(f"{name} has nothing to differentiate by")
    assert outputs(call)[0].requires_grad
    timed(request, benchmark, name, WITH_GRADIENT, call.run)


@CALLS
def test_forward_and_backward(name: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    call = made(name, gradient=True)
    if not call.inputs:
        pytest.skip(f"{name} has nothing to differentiate by")
    grads = [torch.ones_like(out) for out in outputs(call)]
    timed(
        request, benchmark, name, FORWARD_BACKWARD, lambda: torch.autograd.grad(outputs(call), call.inputs, grads)
    )


def outputs(call: Call) -> list[Tensor]:
    out = call.run()
    return [out] if isinstance(out, Tensor) else list(out)
