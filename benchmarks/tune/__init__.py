"""Measures how the Triton kernels are best launched, and writes the table that the package ships.

``passes`` says what is tuned, ``ops`` at which shapes of the models, ``descent`` looks for the fastest.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gdl_kernels import _tuned
from gdl_kernels._tuned import Key
from models.atomic import replacing
from models.checkout import commit

from ..machine import versions
from .descent import Clock, Found, raised, search
from .passes import Pass, Problem, problems


def passes_of(op: str, device: torch.device) -> Iterable[Pass]:
    """What is tuned of an op, the most used first."""
    found: Iterable[Pass] = importlib.import_module(f"{__name__}.ops.{op}").passes(device)
    return found


def tune(
    op: str,
    over: Iterable[Pass],
    path: Path,
    gpu: str,
    say: Callable[[str], None],
    *,
    clock: Clock,
    seconds: float = float("inf"),
) -> list[str]:
    """Find the fastest configuration of each kernel that an op's passes launch, and write it at once.

    Args:
        path: the table that is written. Its rows of the op are replaced, those of others stay.
        gpu: the name of what is measured.
        say: is told what happens, in lines.
        clock: see :data:`descent.Clock`.
        seconds: no kernel's search is begun after so many.

    Returns:
        What got no row because the launcher's own choice is wrong or raises, each with the reason.

    Raises:
        ValueError: if the file is there and isn't a table.
    """
    kept = _rows_of_others(path, op)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {"gpu": gpu, "versions": versions(), **commit(), "date": date}
    end = time.monotonic() + seconds
    known: set[Key] = set()
    rows: list[dict[str, Any]] = []
    failed = []

    def fails(what: object, why: str) -> None:
        failed.append(f"{what}: {why}")
        say(failed[-1])

    for one in over:
        if time.monotonic() >= end:
            say(f"{one}: no time left")
            continue
        try:
            asked = problems(one, known)
        except Exception as error:  # as in a search
            fails(one, f"its own choice {raised(error)}")
            continue
        for problem in asked:
            if time.monotonic() >= end:
                say(f"{problem}: no time left")
                continue
            known.add(problem.key)
            try:
                found = search(problem, clock)
            except ValueError as error:
                fails(problem, str(error))
                continue
            rows.append(_row(problem, found))
            write(path, {**kept, op: {**about, "rows": rows}})
            say(_told(problem, found))
    return failed


def _rows_of_others(path: Path, op: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    _tuned.read(path)
    by_op: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["ops"]
    return {name: part for name, part in by_op.items() if name != op}


def _row(problem: Problem, found: Found) -> dict[str, Any]:
    return {
        "kernel": problem.key[1],
        "key": problem.named_key,
        "config": dict(found.config),
        "at": str(problem.of),
        "ms": found.ms,
        "built_in": dict(problem.built_in),
        "built_in_ms": found.built_in_ms,
        "tried": found.tried,
        "skipped": [{"config": dict(config), "why": why} for config, why in found.skipped],
    }


def write(path: Path, by_op: dict[str, Any]) -> None:
    """Write a table, whole or not at all; a line a row, so that a change shows in a diff."""
    parts = []
    for op, part in sorted(by_op.items()):
        head = json.dumps({name: part[name] for name in _tuned.ABOUT}, ensure_ascii=False)[:-1]
        rows = ",\n".join("   " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in part["rows"])
        parts.append(f'  "{op}": {head}, "rows": [\n{rows}\n  ]}}')
    with replacing(path) as temporary:
        text = ",\n".join(parts)
        temporary.write_text(f'{{\n "schema": {_tuned.SCHEMA},\n "ops": {{\n{text}\n }}\n}}\n', encoding="utf-8")


def _told(problem: Problem, found: Found) -> str:
    skipped = f", {len(found.skipped)} skipped" if found.skipped else ""
    return (
        f"{problem}: {_short(found.config)} in {found.ms:.4g} ms, its own choice {_short(problem.built_in)} in "
        f"{found.built_in_ms:.4g} ms; {found.tried} tried{skipped}"
    )


def _short(config: _tuned.Config) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())
