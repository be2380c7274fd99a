"""verify must say right of what is right and wrong of what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import gdl_kernels as gdl
from gdl_kernels import _backends, _verify
from gdl_kernels.__main__ import app

#: What the kernel of the op below does to the right answer, and what verify is to say of it.
KERNELS: dict[str, Any] = {
    "right": lambda y: y,
    "one element off": lambda y: y + 0.05 * (torch.arange(y.numel()).view_as(y) == 5),
    "not written": lambda y: torch.where(torch.arange(y.numel()).view_as(y) == 5, torch.nan, y),
    "half the gradient": lambda y: y * 0.5 + y.detach() * 0.5,
    "wrong dtype": lambda y: y.double() if y.dtype == torch.float32 else y.float(),
    "raises": lambda y: y.no_such_method(),
}


@pytest.fixture
def op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A public op, exp, with a kernel for the CPU."""

    def doubled(x: Tensor, *, backend: str) -> Tensor:
        y = x.exp()
        return KERNELS[request.param](y) if backend == "cpu" else y

    def examples() -> list[_backends.Example]:
        return [_backends.Example("any", (torch.randn(3, 4, requires_grad=True),))]

    monkeypatch.setattr(gdl, "doubled", doubled, raising=False)
    monkeypatch.setitem(_backends._ops, "doubled", _backends.Choices("doubled", {"cpu": lambda x: []}, examples))
    monkeypatch.setattr(_verify._native, "missing", lambda name: [])
    return request.param


@pytest.mark.parametrize("op", KERNELS, indirect=True)
def test_verdicts(op: str) -> None:
    rows = list(_verify.checks(seed=torch.seed() % 2**31, op="doubled"))
    assert [row.dtype for row in rows] == ["float32", "float16", "bfloat16", "float64"]
    expected = {"right": "right", "raises": "raised"}.get(op, "wrong")
    assert {row.verdict for row in rows} == {expected}
    if op == "half the gradient":
        assert {row.what for row in rows} == {"gradient 0"}


@pytest.mark.parametrize("op", ["right", "one element off", "raises"], indirect=True)
def test_the_exit_status_tells(op: str) -> None:
    outcome = CliRunner().invoke(app, ["verify", "--op", "doubled"])
    assert outcome.exit_code == (0 if op == "right" else 1)
    assert ("4 right, 0 wrong" if op == "right" else "0 right, 4 wrong") in outcome.output


def test_an_unknown_op_is_refused() -> None:
    outcome = CliRunner().invoke(app, ["verify", "--op", "nonsense"])
    assert outcome.exit_code == 2
    assert re.search("must be one of.*sparse_attention", outcome.output, re.DOTALL)


def test_what_cannot_run_here_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is visible, so Triton kernels run here")
    outcome = CliRunner().invoke(app, ["verify", "--op", "sparse_attention"])
    assert "not run here: sparse_attention on triton" in outcome.output or _verify._native.interpreting()
