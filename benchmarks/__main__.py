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

from . import diff, figures, models, ops, record
from .cases import Benchmark
from .machine import machine
from .results import Bar, Result
from .runner import run
from .tables import bars_table, changes_table, result_table
from .timing import FULL, QUICK

app = typer.Typer(add_completion=False)

ROOT = Path(__file__).resolve().parents[1]


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


@app.callback(invoke_without_command=True)
def main(
    ctx: typer.Context,
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
    if ctx.invoked_subcommand is not None:
        return
    on = _chosen_device(device)
    chosen = _benchmarks(ops, op or ([] if model else names(ops)), "--op")
    chosen += _benchmarks(models, model or [], "--model")
    console = _console()
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


@app.command("diff")
def show_difference(before: Path, after: Path) -> None:
    """Show what changed beyond noise between two runs that --json wrote.

    Runs of one machine are compared by their times, runs of two by each row's share of its own machine's ceiling.
    """
    try:
        runs = record.read(before), record.read(after)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = _console()
    for path, run_ in zip((before, after), runs):
        on = run_["machine"]["gpu"] or run_["machine"]["cpu"]
        console.print(f"{path}: commit {str(run_['commit'])[:9]}, {run_['date'][:10]}, {on}", soft_wrap=True)
    if not diff.same_machine(*runs):
        console.print("Two machines: shares of each one's own ceiling are compared, not times.")
    rows = diff.compared_rows(*runs)
    if not rows:
        raise typer.BadParameter(f"{before} and {after} have no row in common")
    console.print(changes_table(diff.changes(*runs), rows))


@app.command("figures")
def write_figures(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit with 1 where a figure differs.")] = False,
) -> None:
    """Write the figures in README.md and docs anew, from the files in benchmarks/results."""
    console = _console()
    try:
        differences = figures.differences(ROOT) if check else []
        changed = [] if check else figures.rewrite(ROOT)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    for difference in differences:
        console.print(str(difference), markup=False, soft_wrap=True)
    for path in changed:
        console.print(f"written: {path.relative_to(ROOT)}", soft_wrap=True)
    if differences:
        console.print("`python -m benchmarks figures` writes them anew.")
        raise typer.Exit(1)


@app.command("page")
def write_page(
    runs: Annotated[list[Path], typer.Argument(help="What --json wrote.")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="The HTML file to write.")] = Path("runs/benchmarks.html"),
    picture: Annotated[list[Path] | None, typer.Option(help="A PNG to show at its end; may be given again.")] = None,
) -> None:
    """Write runs as one HTML page with plots, which needs no other file."""
    from .page import write

    try:
        write(out, [(path.stem, record.read(path)) for path in runs], picture or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _console().print(f"to look at: {out}", soft_wrap=True)


def _console() -> Console:
    """The terminal, or a log of 120 columns: not the 80 of an unknown terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
