"""The benchmark runner: nothing wrong is timed, turns are taken, and what is written is whole."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import benchmarks.__main__
import benchmarks.ops
from benchmarks import record
from benchmarks.__main__ import app
from benchmarks.cases import Case, Contestant, Deferred, Task
from benchmarks.ceilings import Ceiling, matrix_product, memory_read
from benchmarks.correctness import error_share
from benchmarks.launches import launches
from benchmarks.memory import peak_growth
from benchmarks.replays import Recording
from benchmarks.results import Bar, Result, Row, exponent, geometric_mean
from benchmarks.runner import FEW, _recordings, run
from benchmarks.tables import result_table
from benchmarks.timing import Plan, by_turns
from gdl_kernels._backends import Explanation

CPU = torch.device("cpu")
PLAN = Plan(seconds=0, min_rounds=3, max_rounds=3)


def _square(x: Tensor) -> Tensor:
    return x * x


def _tiny(*contestants: Contestant, dtype: torch.dtype = torch.float32, numbers: int = FEW) -> Case:
    return Case(
        name="square",
        shape=f"{numbers}",
        dtype=dtype,
        device=CPU,
        inputs=lambda generator: (torch.randn(numbers, generator=generator, dtype=dtype),),
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
        (lambda x: (x * x)[:-1], r"must be torch.float32 (4096,)"),
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


def _off(*errors: float) -> Callable[[Tensor], Tensor]:
    """The square with a given error at each call."""
    left = list(errors)
    return lambda x: x * x + (left.pop(0) if left else 0.0)


@pytest.mark.parametrize(("numbers", "status"), [(FEW - 1, "wrong"), (FEW, "timed")])
def test_few_numbers_are_compared_on_all_sets_of_inputs(numbers: int, status: str) -> None:
    ours = Contestant("ours", _off(0, 0, 1e-3), explain=OURS.explain)
    row = run("tiny", _tiny(ours, numbers=numbers), PLAN).ours
    assert row is not None
    assert row.status == status


def test_where_plain_is_exact_by_luck_other_sets_of_inputs_count_too() -> None:
    task = Task(_square, _off(0, 1e-3, 1e-3), flops=16.0, bytes=128.0)
    ours = Contestant("ours", _off(1e-3, 1e-3, 1e-3), explain=OURS.explain)
    row = run("tiny", dataclasses.replace(_tiny(ours, numbers=16), task=task), PLAN).ours
    assert row is not None
    assert row.status == "timed"


def test_reference_is_never_called_ours() -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("the reference was run as ours")

    fallen = Contestant("ours", never, explain=_verdicts(reference="chosen", cpu="was not built"))
    (row,) = run("tiny", _tiny(fallen), PLAN).rows
    assert (row.status, row.samples_ms) == ("unavailable", [])
    assert "cpu: was not built" in row.reason


def test_a_rival_that_raises_is_not_available_but_ours_has_failed() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such\n  kernel")

    rival, ours = run("tiny", _tiny(Contestant("rival", broken), dataclasses.replace(OURS, function=broken)), PLAN).rows
    assert (rival.status, ours.status) == ("unavailable", "failed")
    assert rival.reason == ours.reason == "RuntimeError: no such kernel", "on one line"


def _raises(_: Any) -> Any:
    raise MemoryError("all gone")


@pytest.mark.parametrize(("broken", "which"), [("truth", "the truth"), ("plain", "plain PyTorch")])
def test_where_truth_or_plain_pytorch_raises_nothing_that_needs_it_has_a_time(broken: str, which: str) -> None:
    yardstick = Contestant("cube", lambda x: x**3, Task(lambda x: x**3, lambda x: x**3, flops=32.0, bytes=128.0))
    case = _tiny(Contestant("eager", _square), yardstick, OURS)
    task = dataclasses.replace(case.task, **{broken: _raises})
    rows = run("tiny", dataclasses.replace(case, task=task), PLAN).rows
    assert [row.status for row in rows] == ["failed", "timed", "failed"]
    assert {row.reason for row in rows[::2]} == {f"{which}: MemoryError: all gone"}
    assert not any(row.samples_ms for row in rows[::2])


def test_a_truth_that_raises_is_asked_once() -> None:
    asked = 0

    def truth(x: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        raise RuntimeError

    case = _tiny(Contestant("eager", _square), OURS)
    run("tiny", dataclasses.replace(case, task=dataclasses.replace(case.task, truth=truth)), PLAN)
    assert asked == 1


@pytest.mark.parametrize("at", [2, 3, 8])  # its memory is measured, another set's input is prepared, it is timed
def test_a_contestant_that_raises_after_its_check_has_no_time_and_the_others_have(at: int) -> None:
    def sometimes(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == at:
            raise RuntimeError("sometimes")
        return x * x

    def prepared(x: Tensor) -> tuple[Tensor]:
        if len(calls) == at - 1 == 2:
            raise RuntimeError("sometimes")
        return (x,)

    calls: list[Tensor] = []
    result = run("tiny", _tiny(Contestant("sometimes", sometimes, setup=prepared), OURS), PLAN)
    broken, ours = result.rows
    assert (broken.status, broken.reason, broken.samples_ms) == ("failed", "RuntimeError: sometimes", [])
    assert ours.status == "timed"
    assert len(ours.samples_ms) == len(result.ceiling.samples_ms) >= 2


@pytest.mark.parametrize("what", ["inputs", "ceiling", "build"])
def test_what_raises_in_nobodys_row_is_the_case_s_failure(what: str) -> None:
    def gone(*_: Any) -> Any:
        raise MemoryError("all gone")

    candidate = Deferred("square", gone) if what == "build" else dataclasses.replace(_tiny(OURS), **{what: gone})
    result = run("tiny", candidate, PLAN)
    assert (result.case, result.failure, result.rows) == ("square", "MemoryError: all gone", [])
    written = record.document([result], [], CPU, quick=True)["results"][0]
    assert (written["failure"], written["rows"], written["ceiling"]["median_ms"]) == (result.failure, [], None)
    assert "MemoryError: all gone" in str(result_table(result).caption)


def test_an_interruption_is_no_failure() -> None:
    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("tiny", _tiny(Contestant("rival", interrupted), OURS), PLAN)


def test_a_yardstick_is_checked_against_its_own_task() -> None:
    def cube(x: Tensor) -> Tensor:
        return x * x * x

    yardstick = Contestant("cube", cube, Task(cube, cube, flops=32.0, bytes=128.0))
    result = run("tiny", _tiny(yardstick, Contestant("impostor", cube)), PLAN)
    assert [row.status for row in result.rows] == ["timed", "wrong"]
    assert result.rows[0].yardstick
    assert result.rows[0].flops == 32.0


def test_setup_is_called_once_for_each_set_of_inputs_and_not_timed() -> None:
    def halve(x: Tensor) -> tuple[Tensor, Tensor]:
        halved.append(x)
        time.sleep(0.05)
        return x / 2, x * 2

    halved: list[Tensor] = []
    case = _tiny(Contestant("product", lambda half, twice: half * twice, setup=halve))
    (row,) = run("tiny", case, PLAN).rows
    assert row.status == "timed", row.reason
    assert len(halved) == 1 + case.input_sets, "once for the check, and once for each set"
    assert row.median_ms is not None
    assert row.median_ms < 10


@pytest.mark.parametrize(("wrong_at", "status"), [(3, "wrong"), (4, "timed")])
def test_what_is_compared_is_what_the_task_says(wrong_at: int, status: str) -> None:
    rows = torch.tensor([0, 3, 9])

    def some(x: Tensor) -> Tensor:
        return x[rows] ** 2

    def almost(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x)) == wrong_at, 7.0, x * x)

    task = Task(some, some, flops=16.0, bytes=128.0, compared=lambda output: output[rows])
    case = dataclasses.replace(_tiny(Contestant("almost", almost)), task=task)
    assert run("tiny", case, PLAN).rows[0].status == status


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

    run("tiny", dataclasses.replace(_tiny(Contestant("square", square)), input_sets=2), PLAN)
    assert len(set(inputs)) == 2


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


def test_garbage_of_before_takes_nothing_off_a_call_s_memory() -> None:
    """Memory held by a cycle, which Python's collector would free while the call runs."""

    class Link:
        def __init__(self) -> None:
            self.held, self.itself = torch.ones(64 << 20, dtype=torch.uint8), self

    def call() -> None:
        gc.set_threshold(1)  # if it could, the collector would run now
        kept = [[] for _ in range(100)]
        torch.ones(48 << 20, dtype=torch.uint8)
        kept.clear()

    usual = gc.get_threshold()
    gc.set_threshold(10**6)
    Link()
    try:
        growth = peak_growth(call, CPU)
        assert gc.isenabled()
    finally:
        gc.set_threshold(*usual)
    if growth is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert growth >= 47 << 20


def test_a_cpu_launches_nothing_and_its_table_has_no_such_column() -> None:
    result = run("square", _tiny(Contestant("square", _square)), PLAN)
    assert result.rows[0].launches is None
    assert "launches" not in [column.header for column in result_table(result).columns]
    result.rows[0].launches, result.rows[0].as_called_ms = 3, 0.5
    launched, called = result_table(result).columns[-2:]
    assert [launched.header, *launched.cells] == ["launches", "–", "3"]
    assert [called.header, *called.cells] == ["ms as called", "–", "0.5"]


@pytest.mark.gpu
def test_launches_are_what_the_gpu_ran() -> None:
    x = torch.randn(16, device="cuda")
    assert launches(lambda: x.sin().cos(), torch.device("cuda")) == 2


def test_a_case_is_recorded_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(_tiny(), device=torch.device("cuda"), input_sets=2)
    rows = [Row(name, 1.0, 1.0) for name in ("add", "eager", "gdl_kernels")]
    turns = [(row, lambda i: i) for row in rows]
    monkeypatch.setattr("benchmarks.runner.as_called_ms", lambda call, device: 0.5)
    monkeypatch.setattr("benchmarks.runner.record", lambda call, sets, ms, device: Recording(call, 10 * sets))
    assert [recording.calls for recording in _recordings(turns, case)] == [20, 20, 20]
    assert [(row.replayed, row.as_called_ms) for row in rows] == [(True, 0.5)] * 3

    recorded = iter([Recording(lambda i: i, 4), None])
    monkeypatch.setattr("benchmarks.runner.record", lambda *_: next(recorded))
    assert [recording.calls for recording in _recordings(turns, case)] == [1, 1, 1]
    assert [(row.replayed, row.as_called_ms, row.status) for row in rows] == [(False, None, "timed")] * 3
    assert [r.calls for r in _recordings(turns, dataclasses.replace(case, recorded=False))] == [1, 1, 1]


@pytest.mark.gpu
def test_what_can_be_recorded_is_timed_as_replays() -> None:
    def waiting(x: Tensor) -> Tensor:
        return x * x if x.sum().item() else x

    gpu = torch.device("cuda")
    case = dataclasses.replace(
        _tiny(Contestant("eager", _square), Contestant("gdl_kernels", lambda x: x**2)),
        device=gpu,
        inputs=lambda generator: (torch.randn(FEW, generator=generator, device=gpu),),
        ceiling=lambda dtype, device: Ceiling("add", lambda: torch.ones(8, device=gpu) + 1, 8.0),
    )
    waits = dataclasses.replace(case, contestants=[*case.contestants, Contestant("waiting", waiting)])
    for one, replayed in ((case, True), (waits, False), (dataclasses.replace(case, recorded=False), False)):
        result = run("tiny", one, PLAN)
        for row in (result.ceiling, *result.rows):
            assert (row.status, row.replayed, row.as_called_ms is not None) == ("timed", replayed, replayed)
            assert row.median_ms is not None


def test_a_ceiling_of_memory_makes_every_rate_one_of_bytes() -> None:
    def read(dtype: torch.dtype, device: torch.device) -> Ceiling:
        return Ceiling("read", lambda: torch.ones(8).sum(), bytes=32.0)

    result = run("tiny", dataclasses.replace(_tiny(OURS), ceiling=read), PLAN)
    (row,) = result.rows
    assert row.median_ms is not None
    assert row.bytes_per_s == pytest.approx(128.0 / row.median_ms * 1e3)
    row.samples_ms, result.ceiling.samples_ms = [2.0, 4.0], [1.0, 2.0]
    assert result.share_of_ceiling(row) == pytest.approx(128 / 32 / 2)
    assert all("GB/s" in str(cell) for cell in result_table(result).columns[2].cells)


def test_reading_goes_through_all_of_its_memory_in_turn() -> None:
    count, sets = 3 * 4096, 4
    ceiling = memory_read(count, sets)(torch.float32, CPU)
    assert ceiling.bytes == count
    reads = [ceiling.call() for _ in range(2 * sets)]
    assert len({tuple(read.tolist()) for read in reads}) == sets
    assert torch.equal(reads[0], reads[sets])


def test_a_cpu_without_bf16_products_is_measured_against_its_fp32_product(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        ceiling = matrix_product(torch.bfloat16, CPU)
        assert ceiling.call().dtype == dtype
        assert str(dtype).removeprefix("torch.") in ceiling.name


def test_the_geometric_mean() -> None:
    assert geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)
    assert geometric_mean([]) is None


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
from benchmarks.cases import Case, Contestant, Deferred, Task
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


def test_a_run_goes_on_after_a_failure_and_tells_it_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = TINY_OP.replace("OFFSET", "0.0").replace("Task(square, square,", "Task(lambda x: x.no_such, square,")
    unbuilt = broken.replace("    yield Case(", "    yield Deferred('square', lambda: 1 / 0) or Case(")
    for name, text in (("a_broken", broken), ("b_unbuilt", unbuilt), ("c_right", TINY_OP.replace("OFFSET", "0.0"))):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(benchmarks.ops, "__path__", [str(tmp_path)])
    path = tmp_path / "run.json"
    arguments = ["--quick", "--device", "cpu", "--op", "a_broken", "--op", "b_unbuilt", "--op", "c_right"]
    outcome = CliRunner().invoke(app, [*arguments, "--json", str(path)], env={"COLUMNS": "200"})
    assert outcome.exit_code == 1, outcome.output
    told = outcome.output[outcome.output.index("Asked and measured") :]
    why = "AttributeError: 'Tensor' object has no attribute 'no_such'"
    for line in (
        f"Failed: a_broken: square: eager: the truth: {why}", f"Failed: a_broken: square: ours: the truth: {why}",
        "Failed: b_unbuilt: square: ZeroDivisionError: division by zero",
    ):  # fmt: skip
        assert line in told
    failed, unbuilt_result, right = json.loads(path.read_text())["results"]
    assert [row["status"] for row in failed["rows"]] == ["failed", "failed"]
    assert unbuilt_result["failure"] == "ZeroDivisionError: division by zero"
    assert [row["status"] for row in right["rows"]] == ["timed", "timed"]


TWO_CASES = (
    TINY_OP.replace("OFFSET", "0.0")
    .replace('Case("square"', "Case(name")
    .replace("    yield", "    for name in ('square, small', 'square, large'):\n      yield")
)


def test_cases_are_chosen_by_a_part_of_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_cases.py").write_text(TWO_CASES)
    monkeypatch.setattr(benchmarks.ops, "__path__", [*benchmarks.ops.__path__, str(tmp_path)])
    path = tmp_path / "run.json"
    command = ["--op", "two_cases", "--quick", "--device", "cpu", "--json", str(path)]
    for chosen, names in (
        (["large"], ["square, large"]),
        (["large", "small"], ["square, small", "square, large"]),
        ([], ["square, small", "square, large"]),
    ):
        outcome = CliRunner().invoke(app, [*command, *(f"--case={part}" for part in chosen)])
        assert outcome.exit_code == 0, outcome.output
        assert [result["case"] for result in json.loads(path.read_text())["results"]] == names
    outcome = CliRunner().invoke(app, [*command, "--case", "huge"], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert "must be part of a case's name, got 'huge'" in outcome.output


def test_a_case_that_is_not_chosen_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbuilt = "      yield Deferred(name.replace('square', 'unbuilt'), lambda: 1 / 0)\n      yield"
    (tmp_path / "deferred.py").write_text(TWO_CASES.replace("      yield", unbuilt))
    monkeypatch.setattr(benchmarks.ops, "__path__", [*benchmarks.ops.__path__, str(tmp_path)])
    for part, status in (("square", 0), ("unbuilt", 1), ("no such case", 2)):
        outcome = CliRunner().invoke(app, ["--op", "deferred", "--quick", "--device", "cpu", "--case", part])
        assert outcome.exit_code == status, outcome.output


def test_the_run_is_written_after_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is taken away takes nothing but the case at hand."""
    (tmp_path / "broken_off.py").write_text(TWO_CASES.replace("def bars", "    raise KeyboardInterrupt\n\ndef bars"))
    monkeypatch.setattr(benchmarks.ops, "__path__", [*benchmarks.ops.__path__, str(tmp_path)])
    path = tmp_path / "run.json"
    outcome = CliRunner().invoke(app, ["--op", "broken_off", "--quick", "--device", "cpu", "--json", str(path)])
    assert outcome.exit_code != 0
    run_ = json.loads(path.read_text())
    assert [result["case"] for result in run_["results"]] == ["square, small", "square, large"]
    assert len(run_["bars"]) == 1


def test_what_time_is_not_enough_for_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two ops has half of the time, and a case at least; the second has what the first has left over."""
    for name in ("first", "second"):
        (tmp_path / f"{name}.py").write_text(TWO_CASES)
    monkeypatch.setattr(benchmarks.ops, "__path__", [*benchmarks.ops.__path__, str(tmp_path)])
    path, now = tmp_path / "run.json", [0.0]
    monkeypatch.setattr(benchmarks.__main__.time, "monotonic", lambda: now[0])

    def taking(seconds: float) -> Callable[..., Result]:
        def measured(name: str, case: Case, *_: Any) -> Result:
            now[0] += seconds
            rows = [Row(contestant, 16.0, 0.0, samples_ms=[1.0]) for contestant in ("eager", "ours")]
            return Result(name, case.name, case.shape, "float32", None, 0, rows[0], rows)

        return measured

    command = ["--op", "first", "--op", "second", "--quick", "--device", "cpu", "--json", str(path), "--minutes", "1"]
    for seconds, counts, cut_short in (
        (25.0, {"first": 2, "second": 1}, {"second": 1}),
        (31.0, {"first": 1, "second": 1}, {"first": 1, "second": 1}),
        (61.0, {"first": 1}, {"first": 1, "second": 0}),
        (1.0, {"first": 2, "second": 2}, {}),
    ):
        now[0] = 0.0
        monkeypatch.setattr(benchmarks.__main__, "run", taking(seconds))
        outcome = CliRunner().invoke(app, command)
        assert outcome.exit_code == 0, outcome.output
        run_ = json.loads(path.read_text())
        assert run_["cut_short"] == cut_short
        assert {op: sum(r["op"] == op for r in run_["results"]) for op in counts} == counts
        # Both ops have a case of that name: each bar says whose it is.
        assert [bar["claim"] for bar in run_["bars"]] == [f"{op}: square: over eager" for op in counts]
    outcome = CliRunner().invoke(app, [*command[:-1], "0"])
    assert outcome.exit_code == 0, outcome.output
    assert "second: no time for more than 0 cases" in outcome.output
    assert json.loads(path.read_text())["cut_short"] == {"first": 0, "second": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "no_such_op"], "got 'no_such_op'"),
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
