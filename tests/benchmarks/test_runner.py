"""The benchmark runner: nothing wrong is timed, turns are taken, and what is written is whole."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import benchmarks.ops
from benchmarks import record
from benchmarks.__main__ import app
from benchmarks.cases import Case, Contestant, Task
from benchmarks.ceilings import Ceiling
from benchmarks.correctness import error_share
from benchmarks.memory import peak_growth
from benchmarks.ops import sparse_attention
from benchmarks.results import Bar, Result, Row, exponent
from benchmarks.runner import INPUT_SETS, run
from benchmarks.tables import bars_table, result_table
from benchmarks.timing import Plan, by_turns
from gdl_kernels._backends import Explanation

CPU = torch.device("cpu")
PLAN = Plan(seconds=0, min_rounds=3, max_rounds=3)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What is this small only waits for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _square(x: Tensor) -> Tensor:
    return x * x


def _tiny(*contestants: Contestant, dtype: torch.dtype = torch.float32) -> Case:
    return Case(
        name="square",
        shape="16",
        dtype=dtype,
        device=CPU,
        inputs=lambda generator: (torch.randn(16, generator=generator, dtype=dtype),),
        task=Task(_square, _square, flops=16.0, bytes=128.0),
        contestants=contestants,
        ceiling=_low,
    )


def _low(dtype: torch.dtype, device: torch.device) -> Ceiling:
    return Ceiling("add", lambda: torch.ones(8) + 1, 8.0)


def _verdicts(**verdicts: str) -> Callable[..., Explanation]:
    return lambda *_: Explanation("square", verdicts)


OURS = Contestant("ours", lambda x: x**2, explain=_verdicts(reference="can", cpu="chosen"))


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (lambda x: x * x + 1e-3, "times what is allowed"),
        (lambda x: torch.where(x == x.max(), torch.nan, x * x), "inf times"),
        (lambda x: x.double() * x.double(), "must be torch.float32"),
        (lambda x: (x * x)[:-1], r"must be torch.float32 (16,)"),
        (lambda x: (x * x, x), "2 outputs, must be 1"),
    ],
    ids=["off", "one NaN", "dtype", "shape", "count"],
)
def test_a_wrong_contestant_has_no_time(output: Callable[[Tensor], Any], why: str) -> None:
    calls = 0

    def wrong(x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return output(x)

    result = run("tiny", _tiny(Contestant("wrong", wrong), OURS), PLAN)
    row = result.rows[0]
    assert (row.status, row.samples_ms, row.median_ms, row.peak_bytes) == ("wrong", [], None, None)
    assert why in row.reason
    assert calls == 1, "it was called again after its output was wrong"
    assert result.rows[1].status == "timed"
    assert len(result.rows[1].samples_ms) >= 2
    assert result.speed_up(row) is None


def test_wrong_where_plain_is_exact_and_everything_is_zero() -> None:
    zeros = torch.zeros(4)
    assert error_share(zeros, zeros, zeros.double()) == 0
    assert error_share(zeros + 1, zeros, zeros.double()) == float("inf")


def test_a_region_of_small_values_that_is_wrong_is_seen() -> None:
    truth = torch.cat([torch.randn(64).double() * 4, torch.randn(4032).double() * 0.02])
    plain = truth.bfloat16()
    zeroed = torch.where(torch.arange(4096) < 64, plain, 0)
    assert error_share(plain, plain, truth) <= 0.5
    assert (zeroed.double() - truth).abs().max() < 0.1, "no single value is far off"
    assert error_share(zeroed, plain, truth) > 1


def test_twice_the_error_of_plain_is_allowed_and_no_more() -> None:
    truth = torch.randn(64).double()  # the last place of float64 is far below these errors
    plain = truth + 1e-3
    assert error_share(truth + 1.9e-3, plain, truth) < 1 < error_share(truth + 2.1e-3, plain, truth)


def test_reference_is_never_called_ours() -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("the reference was run as ours")

    fallen = Contestant("ours", never, explain=_verdicts(reference="chosen", cpu="was not built"))
    (row,) = run("tiny", _tiny(fallen), PLAN).rows
    assert (row.status, row.samples_ms) == ("unavailable", [])
    assert "cpu: was not built" in row.reason


def test_a_rival_that_raises_is_not_available_but_ours_is_wrong() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    rival, ours = run("tiny", _tiny(Contestant("rival", broken), dataclasses.replace(OURS, function=broken)), PLAN).rows
    assert (rival.status, ours.status) == ("unavailable", "wrong")
    assert rival.reason == ours.reason == "RuntimeError: no such kernel"


def test_a_yardstick_is_checked_against_its_own_task() -> None:
    def cube(x: Tensor) -> Tensor:
        return x * x * x

    yardstick = Contestant("cube", cube, Task(cube, cube, flops=32.0, bytes=128.0))
    result = run("tiny", _tiny(yardstick, Contestant("impostor", cube)), PLAN)
    assert [row.status for row in result.rows] == ["timed", "wrong"]
    assert result.rows[0].yardstick
    assert result.rows[0].flops == 32.0


def test_contestants_take_turns_on_rotating_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.TURN_MS", 0.0)  # a turn is one call
    seen: list[tuple[str, int]] = []
    calls = [lambda i, name=name: seen.append((name, i)) for name in "ABC"]
    samples = by_turns(calls, PLAN, CPU)
    assert seen == [(name, round_) for round_ in range(3) for name in "ABC"]
    assert [len(sample) for sample in samples] == [3, 3, 3]

    inputs: list[float] = []

    def square(x: Tensor) -> Tensor:
        inputs.append(x[0].item())
        return x * x

    run("tiny", _tiny(Contestant("square", square)), PLAN)
    assert len(set(inputs)) == INPUT_SETS


def test_rounds_fill_the_time_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: next(clock))  # every look takes a second
    assert len(by_turns([lambda _: None], Plan(seconds=20, min_rounds=2, max_rounds=50), CPU)[0]) == 8
    assert len(by_turns([lambda _: None], Plan(seconds=5, min_rounds=9, max_rounds=50), CPU)[0]) == 9
    assert len(by_turns([lambda _: None], Plan(seconds=20, min_rounds=2, max_rounds=4), CPU)[0]) == 4


def test_a_fast_call_is_repeated_within_a_turn() -> None:
    counts = [0]

    def fast(_: int) -> None:
        counts[0] += 1

    (samples,) = by_turns([fast], PLAN, CPU)
    assert len(samples) == 2, "the first call alone is too short to be a sample"
    assert counts[0] > 100


def test_ratios_are_taken_within_rounds() -> None:
    ours = Row("ours", 1.0, 0.0, ours=True, samples_ms=[1.0, 10.0, 100.0])  # the machine slows down ...
    rival = Row("rival", 1.0, 0.0, samples_ms=[7.0, 2.0, 20.0, 200.0])  # ... for both
    result = Result(
        "op", "case", "", "float32", None, 0, Row("ceiling", 2.0, 0.0, samples_ms=[1.0, 10.0, 100.0]), [ours, rival]
    )
    assert result.speed_up(rival) == 2.0
    assert result.share_of_ceiling(ours) == 0.5


def test_peak_memory_sees_what_a_call_frees_again() -> None:
    def call() -> None:
        torch.ones(48 << 20, dtype=torch.uint8)

    for _ in range(2):  # memory that the first call left with the allocator must not hide the second
        growth = peak_growth(call, CPU)
        if growth is None:
            pytest.skip("this system does not tell a process's peak memory")
        assert 47 << 20 <= growth <= 60 << 20


def test_the_exponent_of_a_power_law() -> None:
    assert exponent((n, 3.0 * n**1.5) for n in (2, 4, 8)) == pytest.approx(1.5)
    assert exponent([(2, None), (4, 8.0)]) is None


def test_a_bar_that_was_not_measured_is_neither_met_nor_missed() -> None:
    assert [Bar("", 2.0, measured).met for measured in (None, 1.9, 2.0)] == [None, False, True]
    assert [Bar("", 1.1, measured, "", at_most=True).met for measured in (1.0, 1.2)] == [True, False]


def _document() -> dict[str, Any]:
    result = run("tiny", _tiny(OURS), PLAN)
    return record.document([result], [Bar("claim", 2.0, None)], CPU, quick=True)


def test_json_says_what_was_measured_where_and_with_what(tmp_path: Path) -> None:
    path = tmp_path / "results" / "machine" / "run.json"
    record.write(path, _document())
    run_ = json.loads(path.read_text())
    assert run_["machine"]["cpu"]
    assert run_["versions"]["torch"] == torch.__version__
    assert {"date", "commit", "modified", "schema"} <= run_.keys()
    (row,) = run_["results"][0]["rows"]
    assert row["backend"] == "cpu"
    assert row["median_ms"] > 0
    assert len(row["samples_ms"]) >= 2
    assert row["share_of_ceiling"] > 0
    assert run_["bars"][0]["met"] is None


@pytest.mark.parametrize("broken", ["serialisation", "replace"])
def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "run.json"
    path.write_text("the run before")
    run_ = _document()
    if broken == "serialisation":
        run_["machine"] = float("nan")
    else:

        def fail(*_: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((OSError, ValueError)):
        record.write(path, run_)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert path.read_text() == "the run before"


TINY_OP = """
import torch
from benchmarks.cases import Case, Contestant, Task
from benchmarks.ceilings import Ceiling
from benchmarks.results import Bar
from gdl_kernels._backends import Explanation

def square(x):
    return x * x

def cases(device, quick):
    task = Task(square, square, flops=16.0, bytes=128.0)
    contestants = [
        Contestant("eager", square),
        Contestant("ours", lambda x: x**2 + OFFSET, explain=lambda x: Explanation("tiny", {"cpu": "chosen"})),
    ]
    yield Case("square", "16 [elements]", torch.float32, device, lambda g: (torch.randn(16, generator=g),), task,
               contestants, ceiling=lambda dtype, device: Ceiling("add", lambda: torch.ones(8) + 1, 8.0))

def bars(results):
    return [Bar("square: over eager", 1e9, results[0].speed_up(results[0].row("eager")))]
"""


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    name = f"tiny_{'wrong' if wrong else 'right'}"
    (tmp_path / f"{name}.py").write_text(TINY_OP.replace("OFFSET", str(float(wrong))))
    monkeypatch.setattr(benchmarks.ops, "__path__", [*benchmarks.ops.__path__, str(tmp_path)])
    path = tmp_path / "run.json"
    outcome = CliRunner().invoke(app, ["--op", name, "--quick", "--device", "cpu", "--json", str(path)])
    # A missed bar is no failure; a wrong output is, and the run that shows it is still written.
    assert outcome.exit_code == int(wrong), outcome.output
    assert ("not measured" if wrong else "missed") in outcome.output
    assert "16 [elements]" in outcome.output
    rows = json.loads(path.read_text())["results"][0]["rows"]
    assert [row["status"] for row in rows] == ["timed", "wrong" if wrong else "timed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "no_such_op"], "sparse_attention, got 'no_such_op'"),
        (["--device", "tpu"], "must be cpu or cuda, got 'tpu'"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU"),
        ),
        (["--json", "."], "is a directory"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(arguments: list[str], message: str) -> None:
    outcome = CliRunner().invoke(app, ["--op", "sparse_attention", *arguments], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.split())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """sparse_attention's cases at sizes for a test."""
    for name, value in {"HEADS": 2, "POSITIONS": 512, "HEAD_DIM": 16, "WINDOW": 128}.items():
        monkeypatch.setattr(sparse_attention, name, value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_sparse_attention_end_to_end(dtype: torch.dtype, training: bool) -> None:
    case = sparse_attention.case(CPU, dtype, 64, training=training, quick=False)
    # Compiling FlexAttention takes half a minute.
    rivals = [c for c in case.contestants if c.name != sparse_attention.FLEX]
    result = run("sparse_attention", dataclasses.replace(case, contestants=rivals, ceiling=_low), PLAN)
    for row in result.rows:
        served_by_reference = row.backend == "reference"
        assert row.status == ("unavailable" if served_by_reference else "timed"), row.reason
    assert {row.contestant for row in result.rows if row.yardstick} == {"SDPA, dense causal"}
    claims = sparse_attention.bars([result])
    assert len(claims) == (2 if training else 3)
    assert result.case in claims[0].claim
    assert result_table(result).row_count == len(rivals) + 1
    assert bars_table(claims).row_count == len(claims)


@pytest.mark.usefixtures("small")
def test_a_wrong_sparse_attention_has_no_time() -> None:
    """Dense causal attention, passed off as the sparse one."""
    case = sparse_attention.case(CPU, torch.bfloat16, 64, training=False, quick=True)
    impostor = Contestant(
        "impostor", lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    (row,) = run("sparse_attention", dataclasses.replace(case, contestants=[impostor]), PLAN).rows
    assert (row.status, row.samples_ms) == ("wrong", [])


@pytest.mark.usefixtures("small")
def test_operations_are_counted_over_kept_blocks() -> None:
    case = sparse_attention.case(CPU, torch.float32, 64, training=False, quick=True)
    # Of its 8 block rows, row r keeps the three blocks that the last 128 keys lie in, and of the earlier every fourth.
    kept = sum(len({c for c in range(r + 1) if r - c <= 2 or (r - c) % 4 == 0}) for r in range(8))
    assert case.task.flops == 4 * 64**2 * 16 * kept * 2
    trained = sparse_attention.case(CPU, torch.float32, 64, training=True, quick=True)
    assert trained.task.flops == 3.5 * case.task.flops


@pytest.mark.usefixtures("small")
def test_memory_is_fitted_over_the_growth_cases() -> None:
    results = []
    for positions in (512, 1024, 2048):
        case = sparse_attention.growth_case(CPU, positions)
        row = Row(sparse_attention.OURS, case.task.flops, 0.0, ours=True, peak_bytes=positions * 100)
        results.append(Result("sparse_attention", case.name, case.shape, "float32", case.growth, 0, row, [row]))
    (bar,) = sparse_attention.bars(results)
    assert bar.measured == pytest.approx(1.0)
    assert bar.met
