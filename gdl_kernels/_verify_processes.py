"""Checks in processes of their own, an op and a dtype each: several at a time, and none harmed by another's crash.

On a GPU most of the time goes into compiling Triton kernels, which one process does one by one; and after one kernel
has touched memory that isn't its own, nothing works any more in its process.

A process is ``python -m gdl_kernels._verify_processes SELECTION FILE`` and writes a line of JSON for each check.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from . import _backends
from ._verify import DTYPES, Check, Selection, checks, name_of


def checks_in_processes(selection: Selection, jobs: int) -> Iterator[Check]:
    """What :func:`checks` gives, in the order in which processes end.

    Of a process that died or, after Ctrl-C, was stopped, the checks that it had made, and one that says so.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}
    waiting = _parts(selection)
    running: dict[Path, tuple[Selection, subprocess.Popen[bytes]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    part, path = waiting.pop(0), Path(folder, f"{len(waiting)}.json")
                    command = [sys.executable, "-m", __name__, json.dumps(asdict(part)), str(path)]
                    running[path] = part, subprocess.Popen(command, env=environment)
                ended = [path for path, (_, process) in running.items() if process.poll() is not None]
                for path in ended:
                    part, process = running.pop(path)
                    yield from _found(part, path, _death(process.returncode))
                if not ended:
                    time.sleep(0.05)
        except KeyboardInterrupt:
            for _, process in running.values():
                process.kill()
            for path, (part, process) in running.items():
                process.wait()
                yield from _found(part, path, "was stopped")
            raise


def _parts(selection: Selection) -> list[Selection]:
    """One op and one dtype each; those with Triton kernels, which take longest, first."""
    ops = [name for name in _backends.ops() if selection.ops is None or name in selection.ops]
    ops.sort(key=lambda name: "triton" not in _backends.ops()[name].reasons)
    dtypes = [name for name in map(name_of, DTYPES) if selection.dtypes is None or name in selection.dtypes]
    return [replace(selection, ops=[op], dtypes=[dtype]) for op in ops for dtype in dtypes]


def _death(status: int) -> str:
    """How a process ended; nothing if well."""
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    return f"ended with exit status {status}" if status else ""


def _found(part: Selection, path: Path, death: str) -> Iterator[Check]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        if line.endswith("\n"):  # or the process died as it wrote
            yield Check(**json.loads(line))
    if death:
        (op,), (dtype,) = part.ops or (), part.dtypes or ()
        yield Check(op, f"after {len(lines)} checks", "any", dtype, verdict="raised", why=f"its process {death}")


def main(selection: str, path: str) -> None:
    with open(path, "w") as file:
        for check in checks(Selection(**json.loads(selection))):
            print(json.dumps(asdict(check)), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
