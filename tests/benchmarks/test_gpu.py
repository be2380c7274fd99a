"""``make gpu``, as far as a machine without a GPU can tell: its steps, their time, and what it makes of their ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import benchmarks.__main__
import gdl_kernels.__main__
from benchmarks import models, ops, record
from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import reports, running, steps
from benchmarks.gpu.__main__ import main, run_all
from benchmarks.gpu.ending import Outcome, aligned, speed_table
from benchmarks.gpu.steps import DATA, GROUPS, LEAST, PUBLISHED, ROOT, TUNED, Step
from benchmarks.results import Result, Row
from gdl_kernels import _tuned
from models.__main__ import application

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole step here")


def named(folder: Path, name: str, *, long: bool = False) -> Step:
    return next(step for step in steps.steps(folder, long=long) if step.name == name)


# The commands of the steps.


@without_gpu
@pytest.mark.parametrize("model", PUBLISHED)
def test_each_comparison_is_a_command_that_lacks_nothing_but_a_gpu(model: str, tmp_path: Path) -> None:
    _python, _m, module, *arguments = named(tmp_path, f"compare {model}").command
    assert module == "models"
    result = CliRunner().invoke(application(), arguments)
    assert isinstance(result.exception, ValueError), result.output
    assert str(result.exception).startswith("device must be one that this machine has, got 'cuda'")


@without_gpu
@pytest.mark.parametrize("long", [False, True], ids=["quick", "long"])
def test_each_benchmark_is_a_command_that_lacks_nothing_but_a_gpu(tmp_path: Path, long: bool) -> None:
    found = [step for step in steps.steps(tmp_path, long=long) if step.takes_minutes]
    measured = [f"benchmark {group}" for group in GROUPS]
    tuned, models_ = [f"tune {op}" for op in TUNED], [f"benchmark {model}" for model in DATA]
    assert [step.name for step in found] == ([*tuned, *measured, *models_] if long else measured)
    for step in found:
        _python, _m, module, *arguments = step.command
        assert module == "benchmarks"
        app = benchmarks.__main__.app
        result = CliRunner().invoke(app, [*arguments, "--minutes", "1.25"], env={"COLUMNS": "200"})
        assert result.exit_code == 2
        assert "torch sees no" in " ".join(result.output.split())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("variables", "options"), [([], []), (["LONG=1"], ["--long"]), (["MINUTES=7"], ["--minutes", "7"])], ids=str
)
def test_make_gpu_is_this_command(variables: list[str], options: list[str]) -> None:
    command = ["make", "--no-print-directory", "-n", "gpu", "PYTHON=any", *variables]  # which make run by make prints
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["any", "-m", "benchmarks.gpu", *options], done.stderr


def test_every_op_is_measured_once() -> None:
    assert sorted(op for _, group in GROUPS.values() for op in group) == benchmarks.__main__.names(ops)


def test_every_model_is_measured_and_every_op_with_triton_kernels_tuned() -> None:
    assert sorted(DATA) == benchmarks.__main__.names(models)
    assert set(PUBLISHED) <= set(DATA)
    assert sorted(TUNED) == sorted(_tuned.tunables())


def test_in_the_long_form_no_step_may_take_most_of_the_time(tmp_path: Path) -> None:
    planned = steps.steps(tmp_path, long=True)
    assert max(step.share for step in planned) < sum(step.share for step in planned) / 4


@pytest.mark.parametrize("name", ["verify", "memcheck", "racecheck", "initcheck"])
def test_each_verification_is_a_command_that_verify_takes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(gdl_kernels.__main__, "checks_in_processes", lambda *what: asked.append(what) or [])
    monkeypatch.setattr(gdl_kernels._verify, "checks", lambda selection: asked.append((selection, 1)) or [])
    command = list(named(tmp_path, name).command)
    result = CliRunner().invoke(gdl_kernels.__main__.app, command[command.index("gdl_kernels") + 1 :])
    assert result.exit_code == 0, result.output
    ((selection, jobs),) = asked
    assert jobs == steps.JOBS
    if name == "verify":
        assert (selection.backends, selection.dtypes) == (None, None)
    else:
        assert selection.backends == ["cuda", "triton"]
        assert selection.dtypes == (["float32", "bfloat16"] if name == "memcheck" else ["bfloat16"])
    assert selection.poison == (name != "initcheck")  # what poison has filled is initialised


def test_tests_for_a_gpu_are_named(tmp_path: Path) -> None:
    named_paths = [ROOT / word for word in named(tmp_path, "tests").command if word.startswith("tests/")]
    marked = {path for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text()}
    # Those of models import what a machine with a GPU may lack; this file names the mark.
    marked = {path for path in marked if path.parent.name != "models" and path != Path(__file__)}
    assert {path for path in marked if not any(path.is_relative_to(one) for one in named_paths)} == set()
    assert all(any(path.is_relative_to(one) for path in marked) for one in named_paths)


def test_steps_of_several_processes_have_a_thread_in_each(tmp_path: Path) -> None:
    for name in ("tests", "verify", "memcheck"):
        assert named(tmp_path, name).environment["OMP_NUM_THREADS"] == "1"


def test_it_needs_no_module_but_torch_to_run_and_to_end() -> None:
    """Whatever the steps lack, somebody is there to say so."""
    code = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
barred = {"typer", "click", "rich", "jinja2", "matplotlib", "safetensors", "PIL", "triton"}
importlib.machinery.PathFinder.find_spec = lambda name, *at, **of: None if name in barred else find(name, *at, **of)
import benchmarks.gpu.__main__
from benchmarks.gpu import ending, reports, steps
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr


def test_a_step_whose_modules_are_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step("x", ["true"], 1, needs=("json", "no_such_module", "nor_this"), missing="not looked at")
    assert step.cannot == "needs no_such_module, nor_this"
    assert Step("x", ["true"], 1, needs=("json",)).cannot == ""


def test_a_sanitizer_that_is_not_there_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        assert named(tmp_path, "racecheck").cannot == "compute-sanitizer is not on PATH"
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert named(tmp_path, "racecheck").cannot == ""
    assert named(tmp_path, "racecheck").command[:3] == [str(program), "--tool", "racecheck"]


# One command, within its time.


def run(tmp_path: Path, script: str, limit: float = 30.0) -> tuple[int | None, str]:
    log = tmp_path / "log"
    status = running.run(["bash", "-c", script], log, limit, tmp_path, dict(os.environ))
    return status, log.read_text()


def test_what_a_command_prints_is_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "echo one; echo two >&2; exit 3") == (3, "one\ntwo\n")
    assert capsys.readouterr().out == "one\ntwo\n"
    assert run(tmp_path, "kill -SEGV $$")[0] == -signal.SIGSEGV


def dies(pid: int) -> bool:
    """Whether a process, which may have been killed a moment ago, is gone or a zombie within some seconds."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("deaf", [False, True])
def test_a_command_that_takes_too_long_is_stopped_with_all_that_it_started(
    tmp_path: Path, deaf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked as by Ctrl-C, so that it can write what it has; what doesn't listen is killed."""
    monkeypatch.setattr(running, "GRACE", 0.3 if deaf else 20.0)
    trap = "trap '' INT" if deaf else "trap 'echo stopped; exit 1' INT"
    begin = time.monotonic()
    with running.stoppable():
        status, log = run(tmp_path, f"{trap}; sleep 100 & echo $!; while :; do sleep 0.05; done", 0.5)
    assert status is None
    assert time.monotonic() - begin < 15
    assert ("stopped" in log) != deaf
    assert dies(int(log.split()[0]))


def test_what_a_command_leaves_behind_does_not_hold_it_up(tmp_path: Path) -> None:
    begin = time.monotonic()
    status, log = run(tmp_path, "sleep 100 & echo $!")
    assert status == 0
    assert time.monotonic() - begin < 15
    assert dies(int(log))


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert running.run(["/no/such/program"], log, 1, tmp_path, {}) == 127
    assert log.read_text() == "/no/such/program can't be run: No such file or directory\n"


# All steps, within theirs.


def shell(name: str, script: str, share: float = 1, **more: Any) -> Step:
    return Step(name, ["bash", "-c", script], share, **more)


def record_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "checks.json").read_text())["steps"]


def test_each_step_goes_on_when_another_failed_and_the_record_grows(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    found.write_text("of an earlier run")
    planned = [
        shell("one", "echo fine"),
        shell("two", f"cp {tmp_path}/checks.json {tmp_path}/then.json; echo wrong; exit 4"),
        shell("three", "true", missing="no such tool"),
        shell("four", "echo 'Device not supported'; exit 1", refused="Device not supported"),
        shell("five", f"test ! -e {found} && echo $WORD $GDL_KERNELS_CUDA", writes=found, environment={"WORD": "said"}),
    ]
    outcomes = run_all(planned, tmp_path, time.monotonic() + 600, {"gpu": "Some GPU"})
    assert [(name, o.verdict, o.detail) for name, o in outcomes.items()] == [
        ("one", "passed", "fine"),
        ("two", "FAILED", "exit status 4: wrong"),
        ("three", "not run", "no such tool"),
        ("four", "not run", "Device not supported"),
        ("five", "passed", "said 1"),
    ]
    assert json.loads((tmp_path / "checks.json").read_text())["gpu"] == "Some GPU"
    assert [*json.loads((tmp_path / "then.json").read_text())["steps"]] == ["one"]
    assert [*record_of(tmp_path)] == ["one", "two", "three", "four", "five"]
    assert record_of(tmp_path)["three"] == "not run: no such tool"
    assert (tmp_path / "logs" / "two.log").read_text() == "wrong\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time stands still unless it is moved on."""
    now = [1000.0]
    monkeypatch.setattr(command_line.time, "monotonic", lambda: now[0])
    return now


def limits_when(
    takes: Sequence[float], shares: Sequence[float], total: float, folder: Path, clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> list[float | str]:  # fmt: skip
    """The limit of each step, if they take so long; or why it has none."""
    given: list[float] = []

    def fake(step: Step, log: Path, limit: float) -> Outcome:
        given.append(limit)
        clock[0] += min(takes[int(step.name)], limit)
        return Outcome("passed")

    monkeypatch.setattr(command_line, "run_step", fake)
    planned = [shell(str(i), "true", share) for i, share in enumerate(shares)]
    outcomes = run_all(planned, folder, clock[0] + running.GRACE + total, {})
    remaining = iter(given)
    return [o.detail if o.verdict == "not run" else next(remaining) for o in outcomes.values()]


@pytest.mark.parametrize(
    ("takes", "shares", "total", "limits"),
    [
        ((0, 0, 0), (1, 2, 1), 400, [100, 800 / 3, 400]),  # what is left over goes to those that follow
        ((999, 999, 999), (1, 2, 1), 400, [100, 200, 100]),  # who takes too long takes nothing from the others
        ((999, 999, 999), (8, 1, 1), 100, [80, LEAST, "no time left"]),  # the last of the list go without
        ((999, 5, 999), (8, 1, 1), 100, [80, LEAST, 15]),
    ],
)
def test_time_is_shared_out(
    takes: Sequence[float], shares: Sequence[float], total: float, limits: list[float | str], tmp_path: Path,
    clock: list[float], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = limits_when(takes, shares, total, tmp_path, clock, monkeypatch)
    assert given == [limit if isinstance(limit, str) else pytest.approx(limit) for limit in limits]


def test_some_steps_are_given_what_they_need_if_it_is_there(
    tmp_path: Path, clock: list[float], monkeypatch: Any
) -> None:
    given: list[float] = []
    monkeypatch.setattr(command_line, "run_step", lambda step, log, limit: given.append(limit) or Outcome("passed"))
    planned = [shell("build", "true", 1, least=120), shell("measure", "true", 99)]
    for total in (600, 100):
        run_all(planned, tmp_path, clock[0] + running.GRACE + total, {})
    assert given == [120, 600, 100, 100]


def test_a_step_that_can_be_told_is_told_how_long_it_has(tmp_path: Path) -> None:
    step = Step("any", ["bash", "-c", 'echo "$@"', "name"], 1, takes_minutes=True)
    assert command_line.run_step(step, tmp_path / "log", 100).detail == "--minutes 1.50"


def test_after_ctrl_c_the_record_is_whole(tmp_path: Path) -> None:
    """SIGTERM as well: machines that are lent are taken back so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
        timer.start()
        planned = [shell("one", "true"), shell("two", "echo begun; sleep 100"), shell("three", "true")]
        outcomes = run_all(planned, tmp_path, time.monotonic() + 600, {})
        timer.join()
        assert [(o.verdict, o.detail) for o in outcomes.values()] == [
            ("passed", ""), ("stopped", "interrupted"), ("not run", "interrupted")
        ]  # fmt: skip
        assert record_of(tmp_path)["three"] == "not run: interrupted"


# What is read, and the ending.


def test_counts_are_those_of_pytest_itself(tmp_path: Path) -> None:
    (tmp_path / "test_any.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): pass\ndef test_c(): assert False\n"
        "@pytest.mark.skip\ndef test_d(): pass\n@pytest.fixture\ndef broken(): 1 / 0\ndef test_e(broken): pass\n"
    )
    report = tmp_path / "tests.xml"
    assert reports.tested(report) == "pytest wrote no report"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_any.py", f"--junitxml={report}"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert reports.tested(report) == "2 passed, 1 failed, 1 skipped, 1 errors"


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("========= ERROR SUMMARY: 0 errors\n9 right, 0 wrong\n", "0 errors; 9 right, 0 wrong"),
        ("========= ERROR SUMMARY: 1 error\n========= ERROR SUMMARY: 31 errors\n9 right, 3 wrong\n",
         "32 errors; 9 right, 3 wrong"),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n9 right, 0 wrong\n",
         "1 errors; 9 right, 0 wrong"),
        ("9 right, 0 wrong\n========= Error: Target application terminated\n",
         "no summary: ========= Error: Target application terminated"),
    ],
)  # fmt: skip
def test_a_sanitizers_errors_are_added_up(log: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(log)
    assert reports.sanitized(path) == told


def some_run() -> dict[str, Any]:
    def row(name: str, ms: float, **more: Any) -> Row:
        return Row(name, flops=1e9, bytes=0, samples_ms=[ms] * 3, **more)

    ceiling = Row("product", flops=1e9, bytes=0, samples_ms=[0.5] * 3)
    rows = [row("eager", 4.0), row("flex", 2.0), row("dense", 0.1, yardstick=True), row("gdl_kernels", 1.0, ours=True)]
    wrong = Row("gdl_kernels", 1e9, 0, ours=True, status="wrong", reason="its error is 7 times what is allowed")
    alone = [row("gdl_kernels", 1.0, ours=True, replayed=True, as_called_ms=3.0)]
    results = [
        Result("sparse_attention", case, "16", "float32", None, 0, ceiling, of)
        for case, of in (("forward", rows), ("backward", [row("eager", 4.0), wrong]), ("growth", alone))
    ]
    return record.document(results, [], torch.device("cpu"), quick=True, cut_short={"sparse_attention": 3})


def test_speed_is_told_over_eager_and_over_the_best_rival(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    assert speed_table([path]) == ""
    assert reports.measured(path) == "no case was measured"
    record.write(path, some_run())
    assert reports.measured(path) == "3 cases, no time for more; 1 wrong"
    raised = Row("eager", 1e9, 0, status="failed", reason="RuntimeError: out of memory")
    results = [
        Result("adain", "forward", "", "float32", None, 0, Row("copy", 0.0, 1e9), [raised]),
        Result.failed("adain", "backward", "RuntimeError: out of memory"),
    ]
    other = tmp_path / "images.json"
    record.write(other, record.document(results, [], torch.device("cpu"), quick=True, cut_short={}))
    assert reports.measured(other) == "2 cases; 2 failed"
    _headings, forward, backward, growth = speed_table([path, tmp_path / "none.json"]).splitlines()
    assert forward.split() == ["sparse_attention", "forward", "1", "ms", "–", "4.00×", "2.00×", "flex", "50%"]
    assert " ".join(backward.split()) == "sparse_attention backward wrong: its error is 7 times what is allowed"
    assert growth.split() == ["sparse_attention", "growth", "1", "ms", "3", "ms", "–", "–", "50%"]


def test_comparisons_are_told_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    assert reports.compared(path) == "nothing was compared"
    phases = {"forward": {"speedup": 3.14}, "training step": {"speedup": None}}
    path.write_text(json.dumps({"agree": True, "phases": phases}))
    assert reports.compared(path) == "agrees, forward 3.1×"
    path.write_text(json.dumps({"agree": False, "phases": phases}))
    assert reports.compared(path) == "the numbers differ"


def test_columns_are_aligned() -> None:
    assert aligned(["a", "b"], [["long", "x"], ["", "wide one"]]) == "a     b\nlong  x\n      wide one"


FAKE_PYTHON = """#!{python}
import os, sys
arguments = sys.argv[1:]
after = lambda option: next(a for b, a in zip(arguments, arguments[1:]) if b == option)
if "pytest" in arguments:
    path = next(a for a in arguments if a.startswith("--junitxml=")).partition("=")[2]
    open(path, "w").write('<testsuites><testsuite errors="0" failures="0" skipped="2" tests="9"/></testsuites>')
elif "verify" in arguments:
    print("5 right, 0 wrong")
elif "benchmarks" in arguments and "tune" not in arguments:
    assert float(after("--minutes")) > 0
    open(after("--json"), "w").write(open({run!r}).read())
    sys.exit("weights" in after("--json"))
"""

FAKE_SANITIZER = """#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != "$PYTHON_UNDER_TEST" ]; do shift; done
test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 && "$@" && echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.mark.parametrize("long", [False, True], ids=["quick", "long"])
def test_from_the_command_to_its_tables(
    tmp_path: Path, long: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but the GPU's part: Python and compute-sanitizer are scripts that answer as the real ones would."""
    record.write(tmp_path / "run.json", some_run())
    scripts = tmp_path / "bin"
    scripts.mkdir()
    python, sanitizer = scripts / "python", scripts / "compute-sanitizer"
    python.write_text(FAKE_PYTHON.format(python=sys.executable, run=str(tmp_path / "run.json")))
    sanitizer.write_text(FAKE_SANITIZER)
    for script in (python, sanitizer):
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(scripts), prepend=os.pathsep)
    monkeypatch.setenv("PYTHON_UNDER_TEST", str(python))
    monkeypatch.setattr(steps, "PYTHON", str(python))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(steps, "MODELS", ("no_such_module",))
    table = tmp_path / "sm_90.json"
    table.write_text("the table")
    monkeypatch.setattr(command_line._tuned, "path_of", lambda capability: table)
    results = tmp_path / "results"
    assert main(["--results", str(results), *(["--long"] if long else [])]) == 1  # for the group that failed
    summary = (results / "summary.txt").read_text()
    assert summary in capsys.readouterr().out
    told = {name: " ".join(rest) for name, *rest in (re.split(r"  +", line) for line in summary.splitlines())}
    assert told["verify"] == "passed 0 s 5 right, 0 wrong"
    assert told["tests"] == "passed 0 s 7 passed, 0 failed, 2 skipped"
    for tool in ("memcheck", "racecheck", "initcheck"):
        assert told[tool] == "passed 0 s 0 errors; 5 right, 0 wrong"
    assert told["benchmark attention"] == "passed 0 s 3 cases, no time for more; 1 wrong"
    assert told["benchmark weights"].startswith("FAILED 0 s exit status 1: 3 cases")
    assert told["compare sagan"] == "not run needs no_such_module"
    assert told["sparse_attention"].startswith("growth 1 ms")  # the last of its cases
    for name in (*(f"tune {op}" for op in TUNED), "verify, tuned"):
        assert (name in told) == long
    assert (results / "tuned_sm_90.json").exists() == long
    recorded = json.loads((results / "checks.json").read_text())
    assert recorded["gpu"] == "Some GPU"
    assert len(recorded["steps"]) == len(list(steps.steps(results, long=long)))


def test_a_machine_without_a_gpu_is_told_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    assert "sees none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--minutes", "-1"])
    assert "--minutes must be positive, got -1" in capsys.readouterr().err
