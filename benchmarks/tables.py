"""Results for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from .results import Bar, Result, Row

_NOTHING = "–"


def result_table(result: Result) -> Table:
    table = Table(title=f"{result.op}: {result.case}\n{result.shape}", title_justify="left", title_style="bold")
    table.add_column("contestant")
    for heading in ("ms", "quartiles", "rate", "of ceiling", "ours is", "peak memory"):
        table.add_column(heading, justify="right")
    table.add_column("note", overflow="fold")
    table.add_row(*_cells(result, result.ceiling), _NOTHING, "the ceiling", style="dim", end_section=True)
    for row in result.rows:
        faster = _NOTHING if row.ours else _show(result.speed_up(row), "{:.2f}× as fast")
        cells = _cells(result, row)
        cells[5] = faster
        table.add_row(*cells, _memory(row), _note(row), style="bold green" if row.ours else None)
    return table


def bars_table(bars: Sequence[Bar]) -> Table:
    table = Table(title="Asked and measured", title_justify="left", title_style="bold")
    table.add_column("claim")
    table.add_column("asked", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("")
    for bar in bars:
        verdict = {True: "[green]met", False: "[red]missed", None: "[yellow]not measured"}[bar.met]
        asked = f"{'≤' if bar.at_most else '≥'} {_bar_value(bar, bar.asked)}"
        measured = _NOTHING if bar.measured is None else _bar_value(bar, bar.measured)
        table.add_row(bar.claim, asked, measured, verdict)
    return table


def _cells(result: Result, row: Row) -> list[str]:
    quartiles = row.quartiles_ms
    return [
        f"{row.contestant} ({row.backend})" if row.backend else row.contestant,
        _show(row.median_ms, "{:.4g}"),
        _NOTHING if quartiles is None else f"{quartiles[0]:.4g} – {quartiles[1]:.4g}",
        _rate(row.flops_per_s),
        _show(result.share_of_ceiling(row), "{:.0%}"),
        _NOTHING,
    ]


def _note(row: Row) -> str:
    if row.status == "wrong":
        return f"[red]wrong: {escape(row.reason)}"
    if row.status == "unavailable":
        return f"not available: {escape(row.reason)}"
    return "a yardstick: computes another function" if row.yardstick else ""


def _rate(flops_per_s: float | None) -> str:
    if flops_per_s is None:
        return _NOTHING
    return f"{flops_per_s / 1e12:.3g} TFLOP/s" if flops_per_s >= 1e12 else f"{flops_per_s / 1e9:.3g} GFLOP/s"


def _memory(row: Row) -> str:
    return _show(None if row.peak_bytes is None else row.peak_bytes / 2**20, "{:,.0f} MiB")


def _bar_value(bar: Bar, value: float) -> str:
    return f"{value:.0%}" if bar.unit == "%" else f"{value:.2f}{bar.unit}"


def _show(value: float | None, form: str) -> str:
    return _NOTHING if value is None else form.format(value)
