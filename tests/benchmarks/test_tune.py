"""The search for launch configurations: in Triton's interpreter, with a clock that says what the test wants to hear.

TRITON_INTERPRET=1 is settled when kernels are imported, so the interpreter has a process of its own: this file again,
as a test of the first process.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.__main__ import app
from benchmarks.ops.positional_embedding import Size
from benchmarks.tune import descent, passes_of, tune
from benchmarks.tune.descent import Found, search
from benchmarks.tune.ops import (
    conditional_batch_norm,
    minibatch_self_attention,
    minibatch_stddev,
    orthogonal_regularization,
    positional_embedding,
    sparse_attention,
    spectral_normalize,
)
from benchmarks.tune.passes import Pass, Problem, problems
from gdl_kernels import _tuned, layouts
from gdl_kernels import sparse_attention as attention
from gdl_kernels._tuned import Config, Key

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")

interpreted = pytest.mark.skipif(not INTERPRETING, reason="a test of the interpreter's process")
elsewhere = pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")

BUILT_IN = {"own": 32, "step": 16, "num_stages": 1, "num_warps": 4}
BEST = {"own": 32, "step": 32, "num_stages": 2, "num_warps": 4}

LAYOUT = layouts.local(32, 20, block_size=32)

#: Passes that launch each kernel of each op, over next to nothing.
TINY = [
    *(sparse_attention.attention(order, (1, 1, 32, 16), LAYOUT, torch.float32, CPU) for order in (0, 1, 2)),
    # So many keys for one query that they are split among programs, and merged.
    sparse_attention.attention(0, (1, 1, 1, 16), layouts.causal(192, block_size=16), torch.float32, CPU),
    *(minibatch_self_attention.attention(order, (1, 2, 3, 4), torch.bfloat16, CPU) for order in (0, 1, 2)),
    *(
        conditional_batch_norm.normalization(order, (2, 3, 4), torch.float32, CPU, channels_last=order == 1)
        for order in (0, 1, 2)
    ),
    *(minibatch_stddev.deviation(order, (4, 2, 4), torch.bfloat16, CPU, channels_last=order == 1) for order in (0, 1)),
    *(positional_embedding.embedding(order, Size("tiny", 1, 5, 7, 20), torch.float32, CPU) for order in (0, 1)),
    *(spectral_normalize.normalization(order, [(8, 300), (9, 20)], torch.float32, CPU) for order in (0, 1)),
    *(orthogonal_regularization.penalty(order, [(8, 16)], "columns", torch.float32, CPU) for order in (0, 1)),
]


@elsewhere
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= len(TINY) + 4, done.stdout


def problem(of: Pass = TINY[0]) -> Problem:
    (one,) = problems(of, set())
    return one


@functools.cache
def asked(one: Pass) -> list[Problem]:
    return problems(one, set())


def unlaunched(of: Pass = TINY[0]) -> Problem:
    """Without the interpreter nothing can be launched."""
    nothing = torch.zeros(1)
    return Problem(("sparse_attention", "forward", (16, 32, 4, 0)), of, BUILT_IN, lambda: nothing, nothing, nothing)


@pytest.fixture
def used() -> Iterator[list[tuple[Key, Config]]]:
    """What kernels were launched with, in order."""
    seen: list[tuple[Key, Config]] = []

    def see(key: Key, built_in: Config) -> None:
        table = _tuned._regions[-1] if _tuned._regions else _tuned.shipped(90)
        seen.append((key, built_in if table is None else table.rows.get(key, built_in)))

    _tuned.observers.append(see)
    yield seen
    _tuned.observers.remove(see)


def clock_of(
    used: list[tuple[Key, Config]], cost: Callable[[Config], float]
) -> Callable[[Sequence[Callable[[], object]]], list[float]]:
    """A clock by which a call takes what its configuration costs."""

    def clock(calls: Sequence[Callable[[], object]]) -> list[float]:
        times = []
        for call in calls:
            used.clear()
            call()
            times.append(cost(used[0][1]))
        return times

    return clock


def far_from_best(config: Config) -> float:
    choices = _tuned.tunables()["sparse_attention"]["forward"].choices
    return 1 + sum(abs(choices[name].index(config[name]) - choices[name].index(BEST[name])) for name in BEST)


@interpreted
def test_the_fastest_is_found_written_and_launched(
    tmp_path: Path, used: list[tuple[Key, Config]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, said = tmp_path / "tuned" / "sm_90.json", list[str]()
    clock = clock_of(used, far_from_best)
    assert tune("sparse_attention", TINY[:1], path, "Some GPU", said.append, clock=clock) == []
    best, own = ("own 32, step 32, num_stages 2, num_warps 4 in 1", "own 32, step 16, num_stages 1, num_warps 4 in 3")
    assert f"{best} ms, its own choice {own} ms" in said[0]
    table = json.loads(path.read_text())["ops"]["sparse_attention"]
    assert table["gpu"] == "Some GPU"
    assert table["versions"]["torch"] == torch.__version__
    assert table["rows"][0]["built_in"] == BUILT_IN
    assert table["rows"][0]["built_in_ms"] == 3

    monkeypatch.setattr(_tuned, "path_of", lambda capability: path)
    _tuned.shipped.cache_clear()
    tensors = [torch.randn(1, 1, 32, 16) for _ in range(3)]
    used.clear()
    out = attention(*tensors, LAYOUT, backend="triton")
    assert [config for _, config in used] == [BEST]
    torch.testing.assert_close(out, attention(*tensors, LAYOUT, backend="reference"))


@interpreted
def test_what_does_not_compile_spills_or_is_wrong_is_skipped_with_the_reason(used: list[tuple[Key, Config]]) -> None:
    from gdl_kernels import _triton

    whole = TINY[0]

    def fails(*tensors: Tensor, backend: str) -> Any:
        out = whole.function(*tensors, backend=backend)
        if backend == "triton":
            config = used[-1][1]
            for observe in _triton.observers:
                observe(SimpleNamespace(n_spills=12 if config["num_stages"] == 2 else 4))
            if config["own"] == 16:
                raise RuntimeError("much ado\nout of resource: shared memory")
            if config["step"] == 32:
                out = out + 0.01
        return out

    found = search(problem(replace(whole, function=fails)), clock_of(used, lambda config: 8 - config["num_warps"]))
    assert found.config == {**BUILT_IN, "num_warps": 8}
    reasons = [(config, why) for config, why in found.skipped if config["num_warps"] == 4]
    assert ({**BUILT_IN, "num_stages": 2}, "spills 12 registers") in reasons  # four more than its own choice does
    assert ({**BUILT_IN, "own": 16}, "raises RuntimeError: out of resource: shared memory") in reasons
    (wrong,) = (why for config, why in reasons if config["step"] == 32)
    assert re.fullmatch(r"is wrong: .* times what is allowed", wrong)


@interpreted
def test_where_the_own_choice_is_wrong_there_is_no_row(tmp_path: Path) -> None:
    one, path = TINY[0], tmp_path / "table.json"
    wrong = replace(one, function=lambda *x, backend: one.function(*x, backend=backend) + (backend == "triton"))
    _, other, *_ = TINY

    def clock(calls: Sequence[Any]) -> list[float]:
        return [1.0] * len(calls)

    (why,) = tune("sparse_attention", [wrong, other], path, "Some GPU", lambda text: None, clock=clock)
    assert "num_warps': 4} is wrong" in why
    assert [kernel for _, kernel, _ in _tuned.read(path).rows] == ["row_terms", "grad_query", "grad_key_value"]


@elsewhere
def test_where_the_own_choice_raises_as_it_is_prepared_the_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    (why,) = tune("sparse_attention", TINY[:1], path, "Some GPU", lambda text: None, clock=lambda calls: [])
    assert "its own choice raises RuntimeError: backend 'triton' can't serve this sparse_attention" in why
    assert not path.exists()


@interpreted
@pytest.mark.parametrize("one", TINY, ids=str)
def test_every_kernel_is_right_as_the_launcher_has_it_and_at_both_ends_of_its_choices(
    one: Pass, used: list[tuple[Key, Config]]
) -> None:
    assert asked(one)
    for found in asked(one):
        assert not found.tunable.fault(found.named_key, found.built_in), found
        # Small tiles of an attention take the interpreter long, and tests of the op have them.
        for end in (-1,) if "own" in found.built_in else (0, -1):
            choices = found.tunable.choices
            configs = (dict(zip(choices, made)) for made in product(*choices.values()))
            config = [config for config in configs if not found.tunable.fault(found.named_key, config)][end]
            used.clear()
            assert descent._fault(found, config, None) == ("", 0), (found, config)
            launched = [config for key, config in used if key == found.key]
            assert launched
            assert all(other == config for other in launched)


@interpreted
def test_every_kernel_that_a_table_may_set_is_looked_up_by_one_of_these() -> None:
    found = {problem.key[:2] for one in TINY for problem in asked(one)}
    assert found == {(op, kernel) for op, kernels in _tuned.tunables().items() for kernel in kernels}


@interpreted
def test_a_kernel_is_tuned_once_at_each_key() -> None:
    found = {problem.key for problem in asked(TINY[0])}
    assert found
    assert problems(TINY[0], found) == []


@elsewhere
def test_noise_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain within the noise is none, and one that a last look doesn't confirm isn't either."""
    monkeypatch.setattr(descent, "_fault", lambda *_: ("", 0))

    def steady(calls: Sequence[Any]) -> list[float]:
        return [1.0, *[0.99] * (len(calls) - 1)]

    assert search(unlaunched(), steady).config == BUILT_IN

    def fickle(calls: Sequence[Any]) -> list[float]:
        return [1.0, 0.9] if len(calls) == 2 else [1.0, *[0.5] * (len(calls) - 1)]

    found = search(unlaunched(), fickle)
    assert found.config == BUILT_IN
    assert found.ms == found.built_in_ms == 0.9


@elsewhere
def test_neighbours_are_the_next_choices() -> None:
    tunable = _tuned.Tunable((), {"own": (16, 32, 64), "num_stages": (1, 2), "num_warps": (2, 4)})
    found = [tuple(config.values()) for config in descent.neighbours(tunable, dict(zip(tunable.choices, (32, 1, 4))))]
    assert found == [(16, 1, 4), (64, 1, 4), (32, 2, 4), (32, 1, 2), (16, 1, 2)]


@elsewhere
def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "table.json"
    tuned = tune("sparse_attention", TINY[:1], path, "Some GPU", said.append, clock=lambda calls: [], seconds=0)
    assert tuned == []
    assert said[0].endswith("no time left")
    assert not path.exists()


@elsewhere
@pytest.mark.parametrize("op", _tuned.tunables())
def test_each_op_with_triton_kernels_has_passes_of_every_order(op: str) -> None:
    of_op = list(passes_of(op, CPU))
    assert {one.op for one in of_op} == {op}
    assert len({str(one) for one in of_op}) == len(of_op)
    assert {one.order for one in of_op} == {one.order for one in TINY if one.op == op}


@elsewhere
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_time(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    outcome = CliRunner().invoke(app, ["tune", "--out", str(path), "--minutes", "1.5"], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert "a GPU is needed to time kernels, and torch sees none" in " ".join(outcome.output.split())
    assert not path.exists()


@elsewhere
def test_the_command_tunes_what_it_is_asked_for_within_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr("benchmarks.tune.passes_of", lambda op, device: [op])
    monkeypatch.setattr("benchmarks.tune.tune", lambda op, *_, seconds, **__: tuned.append((op, seconds)) or [])
    arguments = ["tune", "--out", str(tmp_path / "table.json"), "--minutes", "2"]
    for ops in (["minibatch_stddev", "positional_embedding"], []):
        tuned.clear()
        outcome = CliRunner().invoke(app, [*arguments, *(word for op in ops for word in ("--op", op))])
        assert outcome.exit_code == 0, outcome.output
        expected = ops or list(_tuned.tunables())
        assert [op for op, _ in tuned] == expected
        assert tuned[0][1] == pytest.approx(120 / len(expected), abs=1)
        assert tuned[-1][1] == pytest.approx(120, abs=1)  # what the others have left over
    outcome = CliRunner().invoke(app, ["tune", "--op", "adain"], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert "must be one of conditional_batch_norm, " in " ".join(outcome.output.split())
    (tmp_path / "table.json").write_text("{")
    outcome = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert "not JSON" in outcome.output


@elsewhere
def test_a_table_reads_as_what_was_found_and_keeps_other_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    wanted: dict[Key, Config] = {}

    def searched(problem: Problem, clock: Any) -> Found:
        wanted[problem.key] = {name: values[0] for name, values in problem.tunable.choices.items()}
        return Found(wanted[problem.key], 1.0, 2.0, 7, [(problem.built_in, "spills 3 registers")])

    def unprepared(one: Pass, known: set[Key]) -> list[Problem]:
        tunables = _tuned.tunables()[one.op]
        keys = [
            (one.op, kernel, tuple(4 if name == "itemsize" else 32 for name in tunable.keys))
            for kernel, tunable in tunables.items()
        ]
        return [replace(unlaunched(one), key=key) for key in keys if key not in known]

    monkeypatch.setattr("benchmarks.tune.search", searched)
    monkeypatch.setattr("benchmarks.tune.problems", unprepared)
    for op in (*_tuned.tunables(), "sparse_attention"):  # once more, which replaces its rows
        gpu = f"{op}'s GPU"
        tune(op, [one for one in TINY if one.op == op], path, gpu, lambda text: None, clock=lambda calls: [])
        table = _tuned.read(path)
        assert table.rows == wanted
        assert table.about[op]["gpu"] == gpu
    assert len(table.about) == len(_tuned.tunables())
    # A line a row.
    assert len(re.findall(r'(?m)^   \{"kernel"', path.read_text())) == len(wanted)
