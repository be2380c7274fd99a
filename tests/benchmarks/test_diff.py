"""`python -m benchmarks diff`: what changed beyond noise, and nothing else."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import record
from benchmarks.__main__ import app
from benchmarks.diff import Change, changes, compared_rows, same_machine
from benchmarks.record import read
from benchmarks.results import Bar, Result, Row

STEADY = [10.0 + 0.01 * i for i in range(-5, 6)]


def a_run(ours: list[float], *, met: bool = True, peak: int = 2**24, status: Any = "timed") -> dict[str, Any]:
    top = Row("copy", flops=0.0, bytes=2e9, samples_ms=list(STEADY))
    rows = [
        Row("eager", 1e9, 1e9, samples_ms=[4 * ms for ms in STEADY], peak_bytes=2**24),
        Row("gdl_kernels", 1e9, 1e9, ours=True, status=status, samples_ms=ours, peak_bytes=peak),
    ]
    bars = [Bar("ours is fast", 2.0, 2.5 if met else 1.5), Bar("never measured", 2.0, None)]
    result = Result("adain", "fp32", "4x4", "float32", None, 1, top, rows)
    written = json.dumps(record.document([result], bars, torch.device("cpu"), quick=True))
    return json.loads(written)


def times(factor: float, spread: float = 0.001) -> list[float]:
    generator = random.Random(3)
    return [10 * factor * (1 + spread * generator.uniform(-1, 1)) for _ in range(21)]


def test_a_run_does_not_differ_from_itself() -> None:
    run = a_run(times(1))
    assert changes(run, copy.deepcopy(run)) == []
    assert compared_rows(run, run) == 3


@pytest.mark.parametrize(("factor", "better"), [(0.8, True), (1.2, False)])
def test_a_steady_change_is_told(factor: float, better: bool) -> None:
    (change,) = changes(a_run(times(1)), a_run(times(factor)))
    assert (change.case, change.contestant, change.what) == ("adain: fp32", "gdl_kernels", "time")
    assert change.after / change.before == pytest.approx(factor, rel=2e-3)  # type: ignore[operator]
    assert change.better is better


def test_noise_is_not_told() -> None:
    assert changes(a_run(times(1, spread=0.5)), a_run(times(1.15, spread=0.5))) == []
    assert changes(a_run(times(1)), a_run(times(1.04))) == []  # steady, but less than a build differs from itself
    assert changes(a_run([10.0]), a_run([20.0])) == []  # one sample knows nothing of noise


def test_two_machines_are_compared_by_their_ceilings() -> None:
    before, after = a_run(times(1)), a_run(times(1))
    after["machine"]["cpu"] = "another"
    for result in after["results"]:  # half as fast in everything: no change
        for row in (result["ceiling"], *result["rows"]):
            row["samples_ms"] = [2 * ms for ms in row["samples_ms"]]
    assert not same_machine(before, after)
    assert changes(before, after) == []
    after["results"][0]["rows"][1]["samples_ms"] = times(1)
    (change,) = changes(before, after)
    assert (change.contestant, change.what, change.better) == ("gdl_kernels", "share of ceiling", True)
    assert change.before == pytest.approx(0.5, rel=0.01)
    assert change.after == pytest.approx(1.0, rel=0.01)


def test_status_memory_and_bars_are_told() -> None:
    before = a_run(times(1))
    (wrong,) = changes(before, a_run([], status="wrong"))
    assert wrong == Change("adain: fp32", "gdl_kernels", "status", "timed", "wrong", better=False)
    (memory,) = changes(before, a_run(times(1), peak=2**25))
    assert (memory.what, memory.before, memory.after, memory.better) == ("memory", 2**24, 2**25, False)
    assert changes(before, a_run(times(1), peak=2**24 + 2**19)) == []
    (bar,) = changes(before, a_run(times(1), met=False))
    assert bar == Change("ours is fast", "", "bar", 2.5, 1.5, better=False)


def test_rows_of_one_run_only_are_left_out() -> None:
    before, after = a_run(times(1)), a_run(times(2))
    after["results"][0]["case"] = "bf16"
    assert compared_rows(before, after) == 0
    assert changes(before, after) == []


def write(path: Path, run: Any) -> str:
    path.write_text(json.dumps(run))
    return str(path)


def test_the_command(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json", a_run(times(1))), write(tmp_path / "b.json", a_run(times(0.5)))
    result = CliRunner().invoke(app, ["diff", a, b])
    assert result.exit_code == 0, result.output
    assert "gdl_kernels" in result.output
    assert "0.50" in result.output
    assert "of 3 rows" in result.output
    assert "eager" not in result.output
    same = CliRunner().invoke(app, ["diff", a, a])
    assert "Nothing." in same.output


def test_files_that_are_no_runs_are_named(tmp_path: Path) -> None:
    for content, why in ((None, "can't be read"), ("{", "not JSON"), ("[1]", "schema must be 1"), ("{}", "got None")):
        path = tmp_path / "run.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(ValueError, match=rf"run\.json: .*{why}"):
            read(path)
    result = CliRunner().invoke(app, ["diff", str(path), str(path)])
    assert result.exit_code == 2
    assert "run.json" in result.output
