"""Runs a command within a time, with all that it starts, and keeps what it prints."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

#: How long a command that was asked to stop has to write what it has.
GRACE = 10.0


def run(command: Sequence[str], log: Path, limit: float, folder: Path, environment: Mapping[str, str]) -> int | None:
    """The exit status of a command, negative for a signal; None if it was stopped after ``limit`` seconds.

    Its output goes to the terminal and to ``log``. It is asked to stop as by Ctrl-C, and killed if it doesn't.
    """
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        log.write_text(f"{command[0]} can't be run: {error.strerror}\n")
        return 127
    log.touch()
    copier = threading.Thread(target=_copy, args=(process, log), daemon=True)
    copier.start()
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)
        copier.join(5)  # what has left the group may hold the pipe for ever


def _copy(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.stdout is not None
    with log.open("wb", buffering=0) as file:
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            file.write(chunk)
            with contextlib.suppress(OSError):  # a terminal that is gone is no reason to stop
                sys.stdout.write(chunk.decode(errors="replace"))
                sys.stdout.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a command if it still runs, and whatever it has left behind."""
    if process.poll() is None:
        _signal(process, signal.SIGINT)
        end = time.monotonic() + GRACE
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt meanwhile, and commands that are started answer to SIGINT.

    Started in a shell's background a process ignores SIGINT, and so does what it starts.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
