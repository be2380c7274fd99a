"""From results to a table in Markdown."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ..results import Result, Row, exponent
from ..tables import NOTHING, bandwidth, duration, mebibytes, rate, share, times
from .block import Block, Entry, Mistake, of_line
from .sources import Results, Source

_FIELD = re.compile(r"\{([^{}]*)\}")
_QUANTITY = re.compile(r"(?P<what>speed-up(?= over )|\w+(?! over ))(?: (?:of|over) (?P<who>.+))?")

#: Of one contestant in one case; None where it is not known.
_OF_A_ROW: dict[str, Callable[[Result, Row], str | None]] = {
    "time": lambda _, row: _shown(duration, row.median_ms),
    "speed-up": lambda result, row: _shown(times, result.speed_up(row)),
    "share": lambda result, row: _shown(share, result.share_of_ceiling(row)),
    "rate": lambda result, row: (
        _shown(bandwidth, row.bytes_per_s) if result.bound_by_bytes else _shown(rate, row.flops_per_s)
    ),
    "memory": lambda _, row: _shown(mebibytes, row.peak_bytes),
    "called": lambda _, row: _shown(duration, row.as_called_ms),
    "name": lambda _, row: row.contestant,
}

#: Of a whole growth curve: the exponent of ours.
_OF_A_CURVE: dict[str, Callable[[Row], float | None]] = {
    "exponent of time": lambda row: row.median_ms,
    "exponent of memory": lambda row: row.peak_bytes,
}


def _shown(form: Callable[[float], str], value: float | None) -> str | None:
    return None if value is None else form(value)


def table(block: Block, results: Results) -> str:
    """The table that a block asks for.

    Raises:
        Mistake: at the line of a case or a quantity that is not there, of a column without any, or of a row in which
            ours has no time.
    """
    columns = [(group.pattern, entry) for group in block.columns for entry in group.entries]
    lines = [[block.corner, *(entry.label for _, entry in columns)], ["---", *("---:" for _ in columns)]]
    empty = {entry.line: entry for _, entry in columns}
    contestants: dict[str, None] = {}
    for row, label, value in _rows(block, results):
        lines.append([label])
        for pattern, entry in columns:
            with of_line(row.line):
                result = results[pattern.replace("*", value)]
                _check_ours(result)
            contestants |= dict.fromkeys(row.contestant for row in result.rows)
            with of_line(entry.line):
                cell, any_value = _cell(entry.value, result, results)
            lines[-1].append(cell)
            if any_value:
                empty.pop(entry.line, None)
    for line, entry in empty.items():
        names = ", ".join(map(repr, contestants))
        raise Mistake(line, f"no row has a value for {entry.value!r}; the contestants are {names}")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rows(block: Block, results: Results) -> Iterator[tuple[Entry, str, str]]:
    """Each row's line, label and value; a value with ``*`` is a row for every case that it fits."""
    for row in block.rows:
        if "*" not in row.value:
            yield row, row.label, row.value
            continue
        with of_line(row.line):
            parts = results.matching(block.columns[0].pattern.replace("*", row.value))
        for part in parts:
            shown = f"{int(part):,}" if part.isdigit() else part
            yield row, row.label.replace("*", shown), row.value.replace("*", part)


def _check_ours(result: Result) -> None:
    ours = result.ours
    if ours is None:
        raise ValueError(f"{result.op}: {result.case} has no row of ours")
    if ours.median_ms is None:
        raise ValueError(f"{result.op}: {result.case}: ours has no time, it is {ours.status}: {ours.reason}")


def _cell(template: str, result: Result, results: Results) -> tuple[str, bool]:
    """The cell's text, and whether any quantity in it has a value."""
    values: list[str | None] = []

    def fill(field: re.Match[str]) -> str:
        value, instead = _value(field[1], result, results)
        values.append(value)
        return instead if value is None else value

    text = _FIELD.sub(fill, template)
    if not values:
        raise ValueError(f"must have a quantity in braces, got {template!r}")
    return text, any(value is not None for value in values)


def _value(text: str, result: Result, results: Results) -> tuple[str | None, str]:
    """What is asked for, and what stands in its place where that is not known."""
    if text == "shape":
        return result.shape or None, NOTHING
    if text in _OF_A_CURVE:
        points = [(n, _OF_A_CURVE[text](r.ours)) for n, r in results.curve(result) if r.ours is not None]
        return _shown("{:.2f}".format, exponent(points)), NOTHING
    match = _QUANTITY.fullmatch(text)
    if match is None or match["what"] not in _OF_A_ROW:
        known = ", ".join([*_OF_A_ROW, *_OF_A_CURVE, "shape"])
        raise ValueError(f"a quantity must be one of {known}, `of` a contestant (speed-up `over` one), got {text!r}")
    row = _contestant(result, match["who"] or "ours")
    if row is None:
        return None, NOTHING
    return _OF_A_ROW[match["what"]](result, row), "wrong" if row.status == "wrong" else NOTHING


def _contestant(result: Result, name: str) -> Row | None:
    if name == "ours":
        return result.ours
    if name == "ceiling":
        return result.ceiling
    if name == "the fastest rival":
        rivals = [row for row in result.rows if row.median_ms is not None and not row.ours and not row.yardstick]
        return min(rivals, key=lambda row: row.median_ms or 0.0, default=None)
    return next((row for row in result.rows if fnmatchcase(row.contestant, name)), None)


def caption(sources: list[Source], document: Path, results: Path) -> str:
    """Where the figures are from: for each machine the files, with their commits and dates."""
    machines: dict[str, list[str]] = {}
    for source in sources:
        link = Path(os.path.relpath(source.path, document.parent)).as_posix()
        on = f"{source.path.parent.relative_to(results).as_posix()} ({source.device})"
        machines.setdefault(on, []).append(f"[{source.path.stem}]({link}) at {source.commit}, {source.date}")
    text = " ".join(f"On {machine}: {'; '.join(files)}." for machine, files in machines.items())
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
