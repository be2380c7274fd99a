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

from .machine import commit, machine, versions
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
        cut_short: of each op for whose other cases there was no time, how many cases were measured.
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
    """Write a run, whole or not at all."""
    text = json.dumps(run, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
