"""The table after the runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .calls import OURS, TORCHS

FORWARD, WITH_GRADIENT, FORWARD_BACKWARD = "forward", "forward with a gradient", "forward and backward"

#: Microseconds that a call may take besides its kernel.
ASKED = {FORWARD: 10, WITH_GRADIENT: 40}


class Measured(NamedTuple):
    """Seconds: of the fastest round, and of the kernel in it where there is one."""

    seconds: float
    kernel: float | None = None


#: By call, then by what was timed.
MEASURED = pytest.StashKey[dict[str, dict[str, Measured]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {}


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    del machine_info["node"]  # whose machine it is matters to nobody


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    for measured in output_json["benchmarks"]:
        measured["stats"].pop("data", None)  # every round's time


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measured = config.stash[MEASURED]
    if not measured:
        return
    console = Console(width=130, file=terminalreporter._tw._file)
    console.print(table(measured))


def table(measured: dict[str, dict[str, Measured]]) -> Table:
    """Bars are of the time besides the kernel; calls without one are of PyTorch's own ops, and have no bars."""
    shown = Table(title="What a call costs, in microseconds (the fastest round)", box=box.SIMPLE_HEAD)
    shown.add_column("call", no_wrap=True)
    for what, asked in ASKED.items():
        shown.add_column(what, justify="right")
        shown.add_column("kernel", justify="right")
        shown.add_column(f"besides:\nasked ≤ {asked}", justify="right")
    shown.add_column(FORWARD_BACKWARD, justify="right")
    for name in (*TORCHS, *OURS):
        if name in measured:
            cells = [cell for what, asked in ASKED.items() for cell in _cells(measured[name].get(what), asked)]
            whole = _cells(measured[name].get(FORWARD_BACKWARD), 0)[0]
            shown.add_row(name, *cells, whole, end_section=name == list(TORCHS)[-1])
    return shown


def _cells(time: Measured | None, asked: float) -> tuple[str, str, str]:
    """All of it, the kernel, and what is left."""
    if time is None:
        return "–", "–", "–"
    whole = f"{1e6 * time.seconds:.1f}"
    if time.kernel is None:
        return whole, "–", "–"
    besides = 1e6 * (time.seconds - time.kernel)
    verdict = "[green]met   [/]" if besides <= asked else "[red]missed[/]"
    return whole, f"{1e6 * time.kernel:.1f}", f"{besides:.1f} {verdict}"
