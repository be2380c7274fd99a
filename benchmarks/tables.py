"""Results for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from .diff import Change
from .results import Bar, Result, Row

#: Where there is no figure.
NOTHING = "–"


def result_table(result: Result) -> Table:
    table = _table(f"{result.op}: {result.case}\n[not bold]{escape(result.shape)}")
    table.add_column("contestant")
    headings = ["ms (quartiles)", "rate", "of ceiling", "ours faster", "memory"]
    if any(row.launches is not None for row in result.rows):
        headings += ["launches", "ms as called"]
    for heading in headings:
        table.add_column(heading, justify="right")
    columns = 1 + len(headings)
    table.add_row(*_cells(result, result.ceiling)[:columns], style="dim", end_section=True)
    for row in result.rows:
        table.add_row(*_cells(result, row)[:columns], style="green" if row.ours else None)
    notes = [note for row in result.rows if (note := _note(row))]
    if result.failure:
        notes.append(f"[red]failed: {escape(result.failure)}[/red]")
    table.caption = "\n".join(notes)
    return table


def failures(result: Result) -> list[str]:
    """What raised where it should not have: the rows that failed, or the case."""
    found = [f"{row.contestant}: {row.reason}" for row in result.rows if row.status == "failed"]
    if result.failure:
        found.append(result.failure)
    return [f"{result.op}: {result.case}: {failure}" for failure in found]


def bars_table(bars: Sequence[Bar]) -> Table:
    table = _table("Asked and measured")
    table.add_column("claim")
    table.add_column("asked", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("")
    for bar in bars:
        verdict = {True: "[green]met", False: "[red]missed", None: "[yellow]not measured"}[bar.met]
        asked = f"{'≤' if bar.at_most else '≥'} {bar_value(bar.unit, bar.asked)}"
        measured = NOTHING if bar.measured is None else bar_value(bar.unit, bar.measured)
        table.add_row(bar.claim, asked, measured, verdict)
    return table


def changes_table(changes: Sequence[Change], rows: int) -> Table:
    table = _table(f"What changed beyond noise, of {rows} rows that both runs have")
    for heading in ("case", "contestant", ""):
        table.add_column(heading)
    for heading in ("before", "after", "after / before"):
        table.add_column(heading, justify="right")
    for change in changes:
        before, after = (_changed(change, value) for value in (change.before, change.after))
        numbers = isinstance(change.before, (int, float)) and isinstance(change.after, (int, float)) and change.before
        ratio = f"{change.after / change.before:.2f}" if numbers else ""  # type: ignore[operator]
        style = "green" if change.better else "red"
        table.add_row(escape(change.case), escape(change.contestant), change.what, before, after, ratio, style=style)
    if not changes:
        table.caption = "Nothing."
    return table


def _changed(change: Change, value: float | str) -> str:
    if isinstance(value, str):
        return value
    forms = {"time": "{:.4g} ms", "share of ceiling": "{:.1%}", "bar": "{:.3g}"}
    return f"{value / 2**20:,.1f} MiB" if change.what == "memory" else forms[change.what].format(value)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", caption_justify="left", box=box.SIMPLE_HEAD)


def _name(row: Row) -> str:
    return f"{row.contestant} ({row.backend})" if row.backend else row.contestant + ("*" if row.yardstick else "")


def _cells(result: Result, row: Row) -> list[str]:
    median, quartiles = row.median_ms, row.quartiles_ms
    time = NOTHING if median is None else milliseconds(median)
    if quartiles is not None:
        time += f" ({milliseconds(quartiles[0])}–{milliseconds(quartiles[1])})"
    return [
        _name(row),
        time,
        bandwidth(row.bytes_per_s) if result.bound_by_bytes else rate(row.flops_per_s),
        _show(result.share_of_ceiling(row), share),
        NOTHING if row.ours or row is result.ceiling else _show(result.speed_up(row), times),
        _show(row.peak_bytes, mebibytes),
        _show(row.launches, str),
        _show(row.as_called_ms, milliseconds),
    ]


def milliseconds(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def _note(row: Row) -> str:
    if row.status in ("wrong", "failed"):
        return f"[red]{_name(row)}: {row.status}: {escape(row.reason)}[/red]"
    if row.status == "unavailable":
        return f"{_name(row)}: not available: {escape(row.reason)}"
    return f"* {row.contestant}: a yardstick, it computes another function" if row.yardstick else ""


def three_digits(value: float) -> str:
    """``0.252``, ``47.6``, ``968``: no fewer digits than three, and no more of a fraction."""
    value = float(f"{value:.3g}") if abs(value) < 1000 else value
    before_the_point = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:,.{max(0, 3 - before_the_point)}f}"


def duration(ms: float) -> str:
    if ms < 0.09995:
        return f"{three_digits(1e3 * ms)} µs"
    return f"{three_digits(ms)} ms" if ms < 999.5 else f"{three_digits(ms / 1e3)} s"


def times(ratio: float) -> str:
    return f"{three_digits(ratio) if ratio >= 10 else f'{ratio:.2f}'}×"


def share(value: float) -> str:
    return f"{value:.0%}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def rate(flops_per_s: float | None) -> str:
    if flops_per_s is None:
        return NOTHING
    scale, unit = (1e12, "TFLOP/s") if flops_per_s >= 1e12 else (1e9, "GFLOP/s")
    return f"{three_digits(flops_per_s / scale)} {unit}"


def bandwidth(bytes_per_s: float | None) -> str:
    return NOTHING if bytes_per_s is None else f"{three_digits(bytes_per_s / 1e9)} GB/s"


def bar_value(unit: str, value: float) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value:.2f}{unit}"


def _show(value: float | None, form: Callable[[float], str]) -> str:
    return NOTHING if value is None else form(value)
