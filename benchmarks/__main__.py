"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import gc
import importlib
import math
import pkgutil
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, cast

import torch
import typer
from rich.console import Console
from rich.markup import escape

from . import diff, figures, models, ops, record
from .cases import Benchmark
from .machine import gpu_capability, machine
from .results import Bar, Result
from .runner import run
from .tables import bars_table, changes_table, failures, result_table
from .timing import FULL, QUICK

app = typer.Typer(add_completion=False)

ROOT = Path(__file__).resolve().parents[1]


def names(package: ModuleType) -> list[str]:
    """The benchmarks in ``ops`` or ``models``."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def _modules(package: ModuleType, chosen: list[str], option: str) -> list[tuple[str, str]]:
    """Each with the name of its module."""
    for name in chosen:
        if name not in names(package):
            raise typer.BadParameter(f"must be one of {', '.join(names(package))}, got {name!r}", param_hint=option)
    return [(name, f"{package.__name__}.{name}") for name in chosen]


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
        list[str] | None, typer.Option(help="An op; may be given again. All ops and models without either.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model; may be given again.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases and rounds: two minutes on two cores.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. A GPU by default, where there is one.")] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases with this in their name; may be given again, for either.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Leave out what doesn't fit; ops and models share what is left evenly.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write the run to this file, after every case.")
    ] = None,
) -> None:
    """Measure ops and models against their rivals on this machine.

    A contestant whose output is wrong has no time, and the exit status is then 1; so it is where anything raised, which
    ends its own row or case and nothing else. What needs a package that is not installed is left out, and told at the
    end; the exit status is then 1 if it was asked for by name.
    """
    if ctx.invoked_subcommand is not None:
        return
    on = _chosen_device(device)
    chosen = _modules(ops, op or ([] if model else names(ops)), "--op")
    chosen += _modules(models, model or ([] if op else names(models)), "--model")
    console = _console()
    console.print(", ".join(f"{name} {value}" for name, value in machine(on).items() if value is not None))
    plan = QUICK if quick else FULL
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    results: list[Result] = []
    bars: list[Bar] = []
    cut_short: dict[str, int] = {}
    missing: list[str] = []
    for place, (name, module) in enumerate(chosen):
        measured: list[Result] = []
        asked: list[Bar] = []
        now = time.monotonic()
        until = now + (deadline - now) / (len(chosen) - place)
        try:
            benchmark = cast(Benchmark, importlib.import_module(module))
            with console.status("") as status:
                for candidate in benchmark.cases(on, quick):
                    if case and not any(part in candidate.name for part in case):
                        continue
                    # Each op and each model has a case, as long as there is any time.
                    if time.monotonic() >= (until if measured else deadline):
                        cut_short[name] = len(measured)
                        console.print(f"{name}: no time for more than {len(measured)} cases")
                        break
                    measured.append(run(name, candidate, plan, lambda text: status.update(escape(text))))
                    console.print(result_table(measured[-1]))
                    # Two ops may have a case of one name.
                    asked = [replace(bar, claim=f"{name}: {bar.claim}") for bar in benchmark.bars(measured)]
                    if json is not None:
                        run_so_far = record.document([*results, *measured], [*bars, *asked], on, quick, cut_short)
                        record.write(json, run_so_far)
        except ModuleNotFoundError as error:
            missing.append(f"{name} (needs {error.name})")
        results += measured
        bars += asked
    if not (results or missing or cut_short):
        raise typer.BadParameter(f"must be part of a case's name, got {', '.join(case or [])!r}", param_hint="--case")
    console.print(bars_table(bars))
    if json is not None:
        record.write(json, record.document(results, bars, on, quick, cut_short))
    wrong = [f"{result.case}: {row.contestant}" for result in results for row in result.rows if row.status == "wrong"]
    failed = [failure for result in results for failure in failures(result)]
    if missing:
        console.print(f"[yellow]Not measured: {escape(', '.join(missing))}: pip install -e '.\\[models]'")
    if wrong:
        console.print(f"[red]Wrong outputs: {escape('; '.join(wrong))}")
    for failure in failed:
        console.print(f"[red]Failed: {escape(failure)}")
    if wrong or failed or (missing and (op or model)):
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
    try:
        from .page import write
    except ModuleNotFoundError as error:
        _console().print(f"{error.name} is not installed; the page needs: pip install -e '.\\[plot]'")
        raise typer.Exit(1) from error
    try:
        write(out, [(path.stem, record.read(path)) for path in runs], picture or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _console().print(f"to look at: {out}", soft_wrap=True)


@app.command("tune")
def measure_configurations(
    op: Annotated[
        list[str] | None, typer.Option(help="An op with Triton kernels; may be given again. All without.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0, help="No kernel's search is begun later; ops share what is left evenly.")
    ] = 180.0,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="The table to write, after every kernel; else the package's.")
    ] = None,
) -> None:
    """Time the Triton kernels in other tiles and warps, and write the table of the fastest.

    In a table that is there, rows of other ops than those that are tuned stay. Exits with 1 if a kernel is wrong or
    raises as the launcher itself would launch it.
    """
    from gdl_kernels import _tuned

    tunable = list(_tuned.tunables())
    for name in op or []:
        if name not in tunable:
            raise typer.BadParameter(f"must be one of {', '.join(tunable)}, got {name!r}", param_hint="--op")
    if not torch.cuda.is_available():
        raise typer.BadParameter("a GPU is needed to time kernels, and torch sees none", param_hint="tune")
    from .tune import passes_of, tune
    from .tune.descent import gpu_clock

    console = _console()
    device, path = torch.device("cuda"), out or _tuned.path_of(gpu_capability())
    chosen = op or tunable
    if path.exists():
        try:
            _tuned.read(path)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--out") from error
    deadline = time.monotonic() + 60 * minutes
    failed = []
    for place, name in enumerate(chosen):
        seconds = (deadline - time.monotonic()) / (len(chosen) - place)
        failed += tune(
            name, passes_of(name, device), path, torch.cuda.get_device_name(),
            lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True), clock=gpu_clock,
            seconds=seconds,
        )  # fmt: skip
    if failed:
        raise typer.Exit(1)


def _console() -> Console:
    """The terminal, or a log of 120 columns: not the 80 of an unknown terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


if __name__ == "__main__":
    # The collector of cycles, which runs after every case and in the midst of what is timed, need not walk through all
    # that was imported: a fifth of a second each time.
    gc.collect()
    gc.freeze()
    app(prog_name="python -m benchmarks")
