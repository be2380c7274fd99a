"""``python -m gdl_kernels info`` and ``verify``."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import _backends, _info, _verify
from ._verify_processes import checks_in_processes

app = typer.Typer(help="What gdl_kernels has on this machine, and whether it is right.", no_args_is_help=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=140)  # a log: not the 80 columns of an unknown terminal


def _grid(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    return table


def _ops_table(ops: Mapping[str, Mapping[str, str]]) -> Table:
    table = Table("", *_backends.BACKENDS, title="Ops", title_justify="left", box=None, padding=(0, 2))
    for op, states in ops.items():
        table.add_row(op, *states.values())
    return table


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON, to paste into a report.")] = False) -> None:
    """Say what is installed, built and usable here, and exactly why anything is not."""
    facts = _info.collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = _console()
    cpu, build = facts["cpu"], facts["build"]
    console.print(_grid("Versions", facts["versions"]))
    gpus = {f"GPU {i}": gpu for i, gpu in enumerate(facts["gpus"])} or {"GPU": "torch sees none"}
    console.print(_grid("Machine", {"CPU": f"{cpu['capability']}, {cpu['threads']} threads: {cpu['module']}", **gpus}))
    console.print(_grid("Native modules", {**facts["native"], **build.get("tools", {})}))
    if facts["tuned"]:
        console.print(_grid("Tuned launch configurations", facts["tuned"]))
    console.print(_grid("Backends", facts["backends"]))
    console.print(_ops_table(facts["ops"]))
    console.print(_grid("Environment", facts["environment"] or {"": "no variable of docs/environment.md is set"}))
    for why in dict.fromkeys(build.get("failed", {}).values()):
        console.print("\nWhat the build failed on:", style="bold red")
        console.print(escape(why))


def _known(option: str, known: Collection[str], given: list[str] | None) -> list[str] | None:
    for name in given or []:
        if name not in known:
            raise typer.BadParameter(f"must be one of {', '.join(known)}, got {name!r}", param_hint=option)
    return given or None


@app.command()
def verify(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given again.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only this backend; may be given again.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype; may be given again.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random inputs; fresh ones by default.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time, each for an op and a dtype.")] = 1,
    poison: Annotated[
        bool, typer.Option("--poison/--no-poison", help="Fill what kernels are to write with NaN beforehand.")
    ] = True,
) -> None:
    """Check every kernel that can run here, two derivatives deep, against float64. Exits with 1 if one is wrong."""
    selection = _verify.Selection(
        secrets.randbelow(2**31) if seed is None else seed,
        _known("--op", _backends.ops(), op),
        _known("--backend", [name for name in _backends.BACKENDS if name != "reference"], backend),
        _known("--dtype", [*map(_verify.name_of, _verify.DTYPES)], dtype),
        poison,
    )
    rows: list[_verify.Check] = []
    try:
        found = _verify.checks(selection) if jobs == 1 else checks_in_processes(selection, jobs)
        rows.extend(found)  # as they come: Ctrl-C leaves those that are there
    finally:
        _show(rows, selection)
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


def _show(rows: list[_verify.Check], selection: _verify.Selection) -> None:
    console = _console()
    table = Table(title=f"Error against float64, seed {selection.seed}", title_justify="left")
    for column in ("op", "example", "backend", "dtype", "worst", "error", "allowed", "verdict"):
        table.add_column(column, overflow="fold")
    colours = {"right": "green", "wrong": "bold red", "raised": "bold red", "can't": "yellow"}
    rows = sorted(rows, key=lambda row: [*_backends.ops()].index(row.op))
    for row in rows:
        figures = (row.what, f"{row.error:.1e}", f"{row.allowed:.1e}") if row.what else ("", "", "")
        verdict = f"[{colours[row.verdict]}]{row.verdict}"
        table.add_row(row.op, escape(row.example), row.backend, row.dtype, *figures, verdict)
    if rows:
        console.print(table)
    for row in rows:
        if row.why:
            console.print(escape(f"{row.verdict}: {row.op} ({row.example}) on {row.backend} in {row.dtype}: {row.why}"))
    for (name, backend), why in _verify.not_run(selection).items():
        console.print(escape(f"not run here: {name} on {backend}: {why}"))
    right = sum(row.verdict == "right" for row in rows)
    console.print(f"{right} right, {sum(row.wrong for row in rows)} wrong")


if __name__ == "__main__":
    app(prog_name="python -m gdl_kernels")
