"""``python -m gdl_kernels info`` and ``verify``."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import _backends, _info, _verify

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
    console.print(_grid("Backends", facts["backends"]))
    console.print(_ops_table(facts["ops"]))
    console.print(_grid("Environment", facts["environment"] or {"": "no variable of docs/environment.md is set"}))
    for why in dict.fromkeys(build.get("failed", {}).values()):
        console.print("\nWhat the build failed on:", style="bold red")
        console.print(escape(why))


@app.command()
def verify(
    op: Annotated[str | None, typer.Option(help="Only this op.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random inputs; fresh ones by default.")] = None,
) -> None:
    """Check every kernel that can run here, two derivatives deep, against float64. Exits with 1 if one is wrong."""
    if op is not None and op not in _backends.ops():
        raise typer.BadParameter(f"must be one of {', '.join(_backends.ops())}, got {op!r}", param_hint="--op")
    seed = secrets.randbelow(2**31) if seed is None else seed
    console = _console()
    table = Table(title=f"Error against float64, seed {seed}", title_justify="left")
    for column in ("op", "example", "backend", "dtype", "worst", "error", "allowed", "verdict"):
        table.add_column(column, overflow="fold")
    rows = list(_verify.checks(seed, op))
    colours = {"right": "green", "wrong": "bold red", "raised": "bold red", "can't": "yellow"}
    for row in rows:
        figures = (row.what, f"{row.error:.1e}", f"{row.allowed:.1e}") if row.what else ("", "", "")
        verdict = f"[{colours[row.verdict]}]{row.verdict}"
        table.add_row(row.op, escape(row.example), row.backend, row.dtype, *figures, verdict)
    if rows:
        console.print(table)
    for row in rows:
        if row.why:
            console.print(escape(f"{row.verdict}: {row.op} ({row.example}) on {row.backend} in {row.dtype}: {row.why}"))
    for (name, backend), why in _verify.not_run().items():
        if op in (None, name):
            console.print(escape(f"not run here: {name} on {backend}: {why}"))
    wrong = sum(row.verdict in ("wrong", "raised") for row in rows)
    right = sum(row.verdict == "right" for row in rows)
    console.print(f"{right} right, {wrong} wrong")
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m gdl_kernels")
