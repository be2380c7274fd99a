"""The search for launch configurations: in Triton's interpreter, with a clock that says what the test wants to hear.

TRITON_INTERPRET=1 is settled when kernels are imported, so the interpreter has a process of its own: this file again,
as a test of the first process.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.__main__ import app
from benchmarks.timing import Call
from benchmarks.tune import descent, tune
from benchmarks.tune.descent import Found, search
from benchmarks.tune.problems import Problem, minibatch_problems, problems, sparse_problems
from gdl_kernels import _tuned, layouts, sparse_attention
from gdl_kernels._tuned import Tiles
from gdl_kernels.ops.minibatch_self_attention.triton import launch as minibatch
from gdl_kernels.ops.sparse_attention.triton import launch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")

interpreted = pytest.mark.skipif(not INTERPRETING, reason="a test of the interpreter's process")
elsewhere = pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")

BEST = Tiles(32, 32, 2, 4)


@elsewhere
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 6, done.stdout


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Tiles]:
    """What kernels were launched with, in order."""
    seen: list[Tiles] = []
    for module in (launch, minibatch):

        def seeing(*arguments: Any, tiles: Callable[..., Tiles] = module.tiles) -> Tiles:
            seen.append(tiles(*arguments))
            return seen[-1]

        monkeypatch.setattr(module, "tiles", seeing)
    return seen


def clock_of(used: list[Tiles], cost: Callable[[Tiles], float]) -> Callable[[Sequence[Call]], list[float]]:
    """A clock by which a call takes what its tiles cost."""

    def clock(calls: Sequence[Call]) -> list[float]:
        times = []
        for call in calls:
            used.clear()
            call(0)
            times.append(cost(used[0]))
        return times

    return clock


def far_from_best(tiles: Tiles) -> float:
    return 1 + sum(abs(math.log2(a / b)) for a, b in zip(tiles, BEST))


def one_problem(kernel: str = "forward") -> Problem:
    layout = layouts.local(32, 20, block_size=32)
    (problem,) = sparse_problems((kernel,), (1, 1, 32, 16), layout, torch.float32, CPU)
    return problem


@interpreted
def test_the_fastest_is_found_written_and_launched(
    tmp_path: Path, used: list[Tiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, path, said = one_problem(), tmp_path / "tuned" / "sm_90.json", list[str]()
    assert problem.built_in == Tiles(32, 16, 1, 4) != BEST
    assert tune([problem], path, "Some GPU", said.append, clock=clock_of(used, far_from_best)) == []
    assert "[32, 32, 2, 4] in 1 ms, its own choice [32, 16, 1, 4] in 3 ms" in said[0]
    table = json.loads(path.read_text())
    assert table["gpu"] == "Some GPU"
    assert table["versions"]["torch"] == torch.__version__
    assert table["rows"][0]["built_in_ms"] == 3

    monkeypatch.setattr(_tuned, "path_of", lambda capability: path)
    _tuned.shipped.cache_clear()
    tensors = [torch.randn(1, 1, 32, 16) for _ in range(3)]
    layout = layouts.local(32, 20, block_size=32)
    used.clear()
    out = sparse_attention(*tensors, layout, backend="triton")
    assert used == [BEST]
    torch.testing.assert_close(out, sparse_attention(*tensors, layout, backend="reference"))


@interpreted
def test_what_does_not_compile_spills_or_is_wrong_is_skipped_with_the_reason(used: list[Tiles]) -> None:
    problem = one_problem()

    def fails(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        out = problem.function(q, k, v, backend=backend)
        if backend == "triton":
            tiles = used[-1]
            for observe in launch.observers:
                observe(SimpleNamespace(name="_forward", n_spills=12 if tiles.num_stages == 2 else 0))
                observe(SimpleNamespace(name="_another", n_spills=99))
            if tiles.own == 16:
                raise RuntimeError("much ado\nout of resource: shared memory")
            if tiles.step == 32:
                out = out + 0.01
        return out

    found = search(replace(problem, function=fails), clock_of(used, lambda tiles: 8 - tiles.num_warps))
    assert found.tiles == Tiles(32, 16, 1, 8)
    assert found.skipped[Tiles(32, 16, 2, 4)] == "spills 12 registers"
    assert found.skipped[Tiles(16, 16, 1, 4)] == "raises RuntimeError: out of resource: shared memory"
    assert re.fullmatch(r"is wrong: .* times what is allowed", found.skipped[Tiles(32, 32, 1, 4)])


@interpreted
def test_where_the_own_choice_is_wrong_there_is_no_row(tmp_path: Path) -> None:
    problem, path = one_problem(), tmp_path / "table.json"
    wrong = replace(problem, function=lambda *x, backend: problem.function(*x, backend=backend) + (backend == "triton"))
    (why,) = tune([wrong, problem], path, "Some GPU", lambda text: None, clock=lambda calls: [1.0] * len(calls))
    assert "its own choice [32, 16, 1, 4] is wrong" in why
    assert len(_tuned.read(path).rows) == 1


@elsewhere
def test_where_the_own_choice_raises_as_it_is_prepared_the_others_go_on(tmp_path: Path) -> None:
    problem, path = one_problem("grad_query"), tmp_path / "table.json"
    (why,) = tune([problem], path, "Some GPU", lambda text: None, clock=lambda calls: [])
    assert "its own choice raises RuntimeError: backend 'triton' can't serve this sparse_attention" in why
    assert not path.exists()


@interpreted
@pytest.mark.parametrize("kernel", _tuned.KERNELS)
def test_every_kernel_is_launched_by_its_problem_and_right(kernel: str, used: list[Tiles]) -> None:
    layout = layouts.local(32, 20, block_size=16)
    (sparse,) = sparse_problems((kernel,), (1, 1, 32, 16), layout, torch.float32, CPU)
    (maps,) = minibatch_problems((kernel,), (1, 2, 3, 4), torch.bfloat16, CPU)
    for problem in (sparse, maps):
        marked = problem.built_in._replace(num_stages=6)  # nothing to the interpreter
        run, plain, truth = problem.prepared()
        used.clear()
        assert descent._fault(problem, marked, run, plain, truth, spills=False) == ""
        assert used.count(marked) == 1


@elsewhere
def test_noise_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain within the noise is none, and one that a last look doesn't confirm isn't either."""
    monkeypatch.setattr(descent, "_fault", lambda *_, **__: "")
    problem = replace(one_problem(), inputs=lambda: [torch.ones(1)], function=lambda x, backend: x)
    built_in = problem.built_in

    def steady(calls: Sequence[Call]) -> list[float]:
        return [1.0, *[0.99] * (len(calls) - 1)]

    assert search(problem, steady).tiles == built_in

    def fickle(calls: Sequence[Call]) -> list[float]:
        return [1.0, 0.9] if len(calls) == 2 else [1.0, *[0.5] * (len(calls) - 1)]

    found = search(problem, lambda calls: fickle(calls) if len(calls) != 2 else [1.0, 0.9])
    assert found.tiles == built_in
    assert found.ms == found.built_in_ms == 0.9


@elsewhere
def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "table.json"
    assert tune([one_problem()], path, "Some GPU", said.append, clock=lambda calls: [], seconds=0) == []
    assert said[0].endswith("no time left")
    assert not path.exists()


@elsewhere
def test_all_problems_have_keys_of_their_own_and_choices_that_they_allow() -> None:
    found = list(problems(CPU))
    keys = [(problem.op, problem.kernel, problem.key) for problem in found]
    assert len(set(keys)) == len(keys) == 5 * 2 * (4 + 2)
    for problem in found:
        assert problem.allows(problem.built_in), problem
        assert len(problem.key) == len(_tuned.KEYS[problem.op])


@elsewhere
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_time(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    outcome = CliRunner().invoke(app, ["tune", "--out", str(path), "--minutes", "1.5"], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert "a GPU is needed to time kernels, and torch sees none" in " ".join(outcome.output.split())
    assert not path.exists()


@elsewhere
def test_a_table_reads_as_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Found(Tiles(16, 64, 3, 4), 1.0, 2.0, 7, {Tiles(16, 16, 1, 2): "spills 3 registers"})
    monkeypatch.setattr("benchmarks.tune.search", lambda problem, clock: found)
    path, listed = tmp_path / "table.json", [one_problem(kernel) for kernel in _tuned.KERNELS]
    tune(listed, path, "Some GPU", lambda text: None, clock=lambda calls: [])
    rows = _tuned.read(path).rows
    assert rows == {(problem.op, problem.kernel, problem.key): found.tiles for problem in listed}
