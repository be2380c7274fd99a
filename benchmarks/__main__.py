"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Annotated, cast

import torch
import typer
from rich.console import Console
from rich.markup import escape

from . import models, ops, record
from .cases import Benchmark
from .machine import machine
from .results import Bar, Result
from .runner import run
from .tables import bars_table, result_table
from .timing import FULL, QUICK

app = typer.Typer(add_completion=False)


def names(package: ModuleType) -> list[str]:
    """The benchmarks in ``ops`` or ``models``."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def _benchmarks(package: ModuleType, chosen: list[str], option: str) -> list[tuple[str, Benchmark]]:
    for name in chosen:
        if name not in names(package):
            raise typer.BadParameter(f"must be one of {', '.join(names(package))}, got {name!r}", param_hint=option)
    return [(name, cast(Benchmark, importlib.import_module(f"{package.__name__}.{name}"))) for name in chosen]


def _chosen_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu or cuda, got {name!r}", param_hint="--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("is cuda, but torch sees no CUDA GPU", param_hint="--device")
    return torch.device(name)


@app.command()
def main(
    op: Annotated[
        list[str] | None, typer.Option(help="An op; may be given again. All ops by default, without --model.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model; may be given again.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases and rounds: two minutes on two cores.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. A GPU by default, where there is one.")] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases with this in their name; may be given again, for either.")
    ] = None,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write the run to this file.")] = None,
) -> None:
    """Measure ops and models against their rivals on this machine.

    A contestant whose output is wrong has no time, and the exit status is then 1.
    """
    on = _chosen_device(device)
    chosen = _benchmarks(ops, op or ([] if model else names(ops)), "--op")
    chosen += _benchmarks(models, model or [], "--model")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log: not the 80 columns of an unknown terminal
    console.print(", ".join(f"{name} {value}" for name, value in machine(on).items() if value is not None))
    plan = QUICK if quick else FULL
    results: list[Result] = []
    bars: list[Bar] = []
    for name, benchmark in chosen:
        measured = []
        with console.status("") as status:
            for candidate in benchmark.cases(on, quick):
                if case and not any(part in candidate.name for part in case):
                    continue
                measured.append(run(name, candidate, plan, lambda text: status.update(escape(text))))
                console.print(result_table(measured[-1]))
        results += measured
        bars += benchmark.bars(measured) if measured else []
    if not results:
        raise typer.BadParameter(f"must be part of a case's name, got {', '.join(case or [])!r}", param_hint="--case")
    console.print(bars_table(bars))
    if json is not None:
        record.write(json, record.document(results, bars, on, quick))
    wrong = [f"{result.case}: {row.contestant}" for result in results for row in result.rows if row.status == "wrong"]
    if wrong:
        console.print(f"[red]Wrong outputs: {escape('; '.join(wrong))}")
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
