"""A run as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from models.atomic import replacing
from models.checkout import commit

from .machine import machine, versions
from .results import Bar, Result, Row

#: Raised when a reader of older files would misread a newer one.
SCHEMA = 1


def document(
    results: Sequence[Result],
    bars: Sequence[Bar],
    device: torch.device,
    quick: bool,
    cut_short: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The run, with the raw samples and with all that is derived from them.

    Args:
        cut_short: of each op or model for whose other cases there was no time, how many were measured.
    """
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **commit(),
        "device": device.type,
        "quick": quick,
        "cut_short": dict(cut_short or {}),
        "machine": machine(device),
        "versions": versions(),
        "results": [_result(result) for result in results],
        "bars": [{**asdict(bar), "met": bar.met} for bar in bars],
    }


def _result(result: Result) -> dict[str, Any]:
    return {
        **asdict(result),
        "ceiling": _row(result, result.ceiling),
        "rows": [{**_row(result, row), "speed_up_of_ours": result.speed_up(row)} for row in result.rows],
    }


def _row(result: Result, row: Row) -> dict[str, Any]:
    return {
        **asdict(row),
        "median_ms": row.median_ms,
        "quartiles_ms": row.quartiles_ms,
        "flops_per_s": row.flops_per_s,
        "bytes_per_s": row.bytes_per_s,
        "share_of_ceiling": result.share_of_ceiling(row),
    }


def write(path: Path, run: dict[str, Any]) -> None:
    """Write a run, or another record, whole or not at all."""
    text = json.dumps(run, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """What is in a file. Raises a ValueError, naming the file, if it can't be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def checked(path: Path, found: Any) -> dict[str, Any]:
    """``found``, if it is a run of this schema. Raises a ValueError, naming the file, if it is not."""
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: not a run of `python -m benchmarks`: its schema must be {SCHEMA}, got {schema!r}")
    return found


def read(path: Path) -> dict[str, Any]:
    """A run's JSON.

    Raises:
        ValueError: naming the file, if it can't be read or is no run of this schema.
    """
    return checked(path, read_json(path))


def ours_and_rivals(result: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, list[Mapping[str, Any]]]:
    """Of a run's result, our row and those of rivals over which ours has a speed-up."""
    ours = next((row for row in result["rows"] if row["ours"]), None)
    return ours, [r for r in result["rows"] if not r["ours"] and not r["yardstick"] and r["speed_up_of_ours"]]
