"""The command line: ``python -m benchmarks.gpu``."""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gdl_kernels import _tuned
from models.checkout import commit

from ..machine import gpu_capability, versions
from ..record import write
from .ending import Outcome, speed_table, steps_table
from .running import GRACE, run, stoppable
from .steps import LEAST, PYTHON, ROOT, Step, steps

#: The minutes that all steps have, unless it is said how many.
QUICK, LONG = 10.0, 240.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps. The exit status is 1 if one failed or was stopped."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description="Build, check, test and measure on a GPU.")
    parser.add_argument("--long", action="store_true", help="tune the Triton kernels, and measure every case")
    parser.add_argument("--minutes", type=float, help=f"for all steps; {QUICK:.0f}, or {LONG:.0f} with --long")
    parser.add_argument("--results", type=Path, help="the folder to write to; benchmarks/results/<gpu> by default")
    asked = parser.parse_args(arguments)
    minutes = (LONG if asked.long else QUICK) if asked.minutes is None else asked.minutes
    if minutes <= 0:
        parser.error(f"--minutes must be positive, got {minutes}")
    if not torch.cuda.is_available():
        print(f"make gpu needs a CUDA GPU, and torch {torch.__version__} in {PYTHON} sees none.", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign is no reason to stop
    end = time.monotonic() + 60 * minutes
    gpu = torch.cuda.get_device_name()
    results = asked.results or ROOT / "benchmarks" / "results" / re.sub(r"\W+", "-", gpu).strip("-").lower()
    results = results.resolve()
    planned = steps(results, long=asked.long)
    about = {
        "gpu": gpu,
        "versions": versions(),
        **commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "long": asked.long,
    }
    outcomes = run_all(planned, results, end, about)
    table = _tuned.path_of(gpu_capability())
    if asked.long and table.exists():
        shutil.copy2(table, results / f"tuned_{table.name}")
    runs = [step.writes for step in planned if step.writes and step.name.startswith("benchmark ")]
    tables = [f"{gpu}, torch {torch.__version__}, {about['date']}", steps_table(outcomes), speed_table(runs)]
    text = "\n\n".join(filter(None, tables)) + "\n"
    (results / "summary.txt").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {results}")
    return int(any(outcome.verdict in ("FAILED", "stopped") for outcome in outcomes.values()))


def run_all(planned: Sequence[Step], results: Path, end: float, about: Mapping[str, Any]) -> dict[str, Outcome]:
    """Run the steps until ``end``, in seconds of ``time.monotonic``; after each, ``results/checks.json`` is written.

    A step may take its share of the time that is left, among those that are still to come, or its ``least`` if that is
    more: so one that hangs doesn't take what the others need, and what one leaves over goes to all that follow.
    """
    logs = results / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for step in planned:  # what another run has left must not pass for this one's
        for old in (step.writes, _log(logs, step)):
            if old is not None:
                old.unlink(missing_ok=True)
    outcomes: dict[str, Outcome] = {}
    interrupted = False
    with stoppable():
        for place, step in enumerate(planned):
            if interrupted:
                outcomes[step.name] = Outcome("not run", detail="interrupted")
            elif step.cannot:
                outcomes[step.name] = Outcome("not run", detail=step.cannot)
            else:
                left = end - GRACE - time.monotonic()
                shares = sum(later.share for later in planned[place:] if not later.cannot)
                if left < LEAST:
                    outcomes[step.name] = Outcome("not run", detail="no time left")
                else:
                    started = time.monotonic()
                    try:
                        limit = min(left, max(step.least, left * step.share / shares))
                        outcomes[step.name] = run_step(step, _log(logs, step), limit)
                    except KeyboardInterrupt:
                        interrupted = True
                        outcomes[step.name] = Outcome("stopped", time.monotonic() - started, "interrupted")
            write_record(results / "checks.json", about, outcomes)
    return outcomes


def _log(logs: Path, step: Step) -> Path:
    return logs / f"{re.sub(r'[^a-z]+', '_', step.name)}.log"


def run_step(step: Step, log: Path, limit: float) -> Outcome:
    command = [*step.command, *(["--minutes", f"{0.9 * limit / 60:.2f}"] if step.takes_minutes else [])]
    print(f"\n== {step.name}, at most {limit:.0f} s: {' '.join(command)}", flush=True)
    environment = {
        **os.environ,
        "GDL_KERNELS_CUDA": "1",
        "GDL_KERNELS_REQUIRE_NATIVE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",  # whatever the terminal's is
        **step.environment,
    }
    started = time.monotonic()
    status = run(command, log, limit, ROOT, environment)
    seconds = time.monotonic() - started
    if status and step.refused and step.refused in log.read_text(errors="replace"):
        return Outcome("not run", detail=step.refused)
    report = step.report(log)
    if status is None:
        return Outcome("stopped", seconds, report)
    if status:
        return Outcome("FAILED", seconds, f"exit status {status}" + (f": {report}" if report else ""))
    return Outcome("passed", seconds, report)


def write_record(path: Path, about: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> None:
    """What docs/verified.md cites: which commit was checked where and when."""
    record = {**about, "steps": {name: str(outcome) for name, outcome in outcomes.items()}}
    write(path, record)


if __name__ == "__main__":
    sys.exit(main())
