"""Measures how the Triton kernels of the attentions are best launched, and writes the table that the package ships."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gdl_kernels import _tuned
from models.atomic import replacing
from models.checkout import commit

from ..machine import versions
from .descent import Clock, Found, search
from .problems import Problem


def tune(
    problems: Iterable[Problem],
    path: Path,
    gpu: str,
    say: Callable[[str], None],
    *,
    clock: Clock,
    seconds: float = float("inf"),
) -> list[str]:
    """Find the fastest configuration for each problem, and write the table of them after every one.

    Args:
        path: the table that is written; one that is there is replaced.
        gpu: the name of what is measured.
        say: is told what happens, in lines.
        clock: see :data:`descent.Clock`.
        seconds: no problem is begun after so many.

    Returns:
        The problems that got no row because the launcher's own choice is wrong or raises, each with the reason.
    """
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {"gpu": gpu, "versions": versions(), **commit(), "date": date}
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    failed = []
    for problem in problems:
        if time.monotonic() >= end:
            say(f"{problem}: no time left")
            continue
        try:
            found = search(problem, clock)
        except ValueError as error:
            failed.append(f"{problem}: {error}")
            say(failed[-1])
            continue
        rows.append(_row(problem, found))
        write(path, about, rows)
        say(_told(problem, found))
    return failed


def _row(problem: Problem, found: Found) -> dict[str, Any]:
    return {
        "op": problem.op,
        "kernel": problem.kernel,
        **dict(zip(_tuned.KEYS[problem.op], problem.key)),
        **found.tiles._asdict(),
        "at": problem.shape,
        "ms": found.ms,
        "built_in": list(problem.built_in),
        "built_in_ms": found.built_in_ms,
        "tried": found.tried,
        "skipped": {str(list(tiles)): why for tiles, why in found.skipped.items()},
    }


def write(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a table, whole or not at all; a line a row, so that a change shows in a diff."""
    head = json.dumps({"schema": _tuned.SCHEMA, **about}, indent=1, ensure_ascii=False)[:-2]
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    with replacing(path) as temporary:
        temporary.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _told(problem: Problem, found: Found) -> str:
    skipped = f", {len(found.skipped)} skipped" if found.skipped else ""
    return (
        f"{problem}: {list(found.tiles)} in {found.ms:.4g} ms, its own choice {list(problem.built_in)} in "
        f"{found.built_in_ms:.4g} ms; {found.tried} tried{skipped}"
    )
