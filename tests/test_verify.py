"""verify must say right of what is right and wrong of what is wrong."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import gdl_kernels as gdl
from gdl_kernels import _backends, _verify
from gdl_kernels.__main__ import app
from gdl_kernels._verify_processes import checks_in_processes

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
    rows = list(_verify.checks(_verify.Selection(torch.seed() % 2**31, ops=["doubled"])))
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


def test_one_backend_and_one_dtype() -> None:
    selection = _verify.Selection(3, ["pixel_norm", "minibatch_stddev"], ["cpu"], ["float16"])
    rows = list(_verify.checks(selection))
    assert {(row.op, row.backend, row.dtype) for row in rows} == {(op, "cpu", "float16") for op in selection.ops or ()}
    for option, wrong in (("--backend", "reference"), ("--dtype", "int8")):
        outcome = CliRunner().invoke(app, ["verify", option, wrong])
        assert outcome.exit_code == 2
        assert re.search(f"must be one of.*{wrong}", outcome.output, re.DOTALL)


@pytest.mark.parametrize("poison", [True, False])
def test_poison_is_left_out_where_another_tool_looks(poison: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sanitizer takes memory that poison has filled for written."""
    seen = []

    def filled(x: Tensor, *, backend: str) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return x.exp()

    examples = [_backends.Example("any", (torch.randn(3, requires_grad=True),))]
    monkeypatch.setattr(gdl, "filled", filled, raising=False)
    choices = _backends.Choices("filled", {"cpu": lambda x: []}, lambda: examples)
    monkeypatch.setitem(_backends._ops, "filled", choices)
    list(_verify.checks(_verify.Selection(3, ["filled"], dtypes=["float32"], poison=poison)))
    assert seen == [poison, False, False]


def test_processes_find_what_one_finds_and_one_that_dies_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Python that dies where it is to check float16, after one check and part of another."""
    python = tmp_path / "python"
    line = json.dumps(asdict(_verify.Check("pixel_norm", "any", "cpu", "float16")))
    python.write_text(
        "#!/bin/sh\n"
        f"case \"$3\" in *float16*) printf '%s\\n%s' '{line}' '{line[:9]}' > \"$4\"; kill -SEGV $$;; esac\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    rows = list(checks_in_processes(_verify.Selection(3, ["pixel_norm"], ["cpu"], ["float16", "float32"]), 2))
    alone = list(_verify.checks(_verify.Selection(3, ["pixel_norm"], ["cpu"], ["float32"])))
    assert alone
    assert [(r.example, r.verdict) for r in rows if r.dtype == "float32"] == [(r.example, "right") for r in alone]
    right, dead = (row for row in rows if row.dtype == "float16")
    assert (right.example, right.verdict) == ("any", "right")
    assert (dead.verdict, dead.why) == ("raised", "its process died of SIGSEGV")


def test_what_was_found_before_ctrl_c_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(selection: _verify.Selection) -> Iterator[_verify.Check]:
        yield _verify.Check("pixel_norm", "any", "cpu", "float32")
        raise KeyboardInterrupt

    monkeypatch.setattr(_verify, "checks", interrupted)
    outcome = CliRunner().invoke(app, ["verify"])
    assert outcome.exit_code != 0
    assert "1 right, 0 wrong" in outcome.output
