"""The table after the runs."""

from __future__ import annotations

import pytest
from rich import box
from rich.console import Console
from rich.table import Table

from .calls import OURS, TORCHS

FORWARD, KERNEL = "forward", "its kernel"
WITH_GRADIENT, FORWARD_BACKWARD = "forward with a gradient", "forward and backward"

#: Microseconds that a call may take besides its kernel: forward without a gradient, and forward with one.
ASKED = {FORWARD: 10, WITH_GRADIENT: 40}

#: By call and by what was timed, the seconds of its fastest round.
MEASURED = pytest.StashKey[dict[str, dict[str, float]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measured = config.stash[MEASURED]
    if not measured:
        return
    console = Console(width=120, file=terminalreporter._tw._file)
    console.print(table(measured))


def table(measured: dict[str, dict[str, float]]) -> Table:
    """Bars are of the time besides the kernel; calls without one are of PyTorch's own ops."""
    shown = Table(title="What a call costs, in microseconds (the fastest round)", box=box.SIMPLE_HEAD)
    shown.add_column("call", no_wrap=True)
    shown.add_column(FORWARD, justify="right")
    shown.add_column(KERNEL, justify="right")
    for what, asked in ASKED.items():
        shown.add_column(f"{what}, less the kernel:\nasked ≤ {asked}", justify="right")
    shown.add_column(FORWARD_BACKWARD, justify="right")
    for name in (*TORCHS, *OURS):
        if name not in measured:
            continue
        times = {what: 1e6 * seconds for what, seconds in measured[name].items()}
        cells = [_microseconds(times.get(what)) for what in (FORWARD, KERNEL)]
        cells += [_besides(times.get(what), times.get(KERNEL), asked) for what, asked in ASKED.items()]
        shown.add_row(name, *cells, _microseconds(times.get(FORWARD_BACKWARD)), end_section=name == list(TORCHS)[-1])
    return shown


def _besides(time: float | None, kernel: float | None, asked: float) -> str:
    if time is None or kernel is None:
        return _microseconds(time)
    besides = time - kernel
    return f"{besides:.1f} " + ("[green]met   [/]" if besides <= asked else "[red]missed[/]")


def _microseconds(time: float | None) -> str:
    return "–" if time is None else f"{time:.1f}"
