"""The benchmark of what a call costs has every op, and its table says what was asked."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch.utils._pytree import tree_leaves

from benchmarks.dispatch import calls, conftest
from gdl_kernels import _backends, _native


def test_every_op_has_a_call() -> None:
    ops = {name.split(",")[0] for name in calls.OURS}
    assert set(_backends.ops()) | {"merge_attention", "truncated_normal"} == ops


@pytest.mark.parametrize("name", [*calls.OURS, *calls.TORCHS])
def test_calls_run(name: str) -> None:
    make = (calls.OURS | calls.TORCHS)[name]
    plain, differentiable = make(False), make(True)
    assert not any(out.requires_grad for out in tree_leaves(plain.run()))
    assert all(out.requires_grad for out in tree_leaves(differentiable.run())) == bool(differentiable.inputs)


@pytest.mark.skipif(bool(_native.missing("cpu")), reason="no C++ kernels")
def test_the_time_of_bindings_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each binding that a call comes to is timed, with the call's result as it was."""
    timed = []

    def seconds(run: object) -> float:
        timed.append(run())  # type: ignore[operator]
        return 0.25

    monkeypatch.setattr(calls, "seconds", seconds)
    call = calls.OURS["adain"](False)
    expected, got = call.run(), []
    assert calls.bindings(lambda: got.extend([call.run(), call.run()])) == 0.5
    assert len(timed) == len(got) == 2
    assert all(torch.equal(out, expected) for out in got)


def test_the_table_holds_bars_against_what_is_left_without_the_kernel() -> None:
    measured = {
        "F.group_norm": {conftest.FORWARD: conftest.Measured(4e-6)},
        "adain": {
            conftest.FORWARD: conftest.Measured(11e-6, 1.5e-6),
            conftest.WITH_GRADIENT: conftest.Measured(42.5e-6, 2e-6),
        },
    }
    console = Console(width=160)
    with console.capture() as capture:
        console.print(conftest.table(measured))
    shown = {line.split()[0]: line.split()[1:] for line in capture.get().splitlines() if line.split()}
    assert shown["F.group_norm"] == ["4.0", "–", "–", "–", "–", "–", "–"]
    assert shown["adain"] == ["11.0", "1.5", "9.5", "met", "42.5", "2.0", "40.5", "missed", "–"]
