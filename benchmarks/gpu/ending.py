"""The tables that ``make gpu`` ends in, in plain text: what passed and failed, and how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..record import ours_and_rivals, read


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        detail: what its report says; of a step that was not run, why.
    """

    verdict: Literal["passed", "FAILED", "stopped", "not run"]
    seconds: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        if self.verdict == "not run":
            return f"not run: {self.detail}"
        after = "after " if self.verdict == "stopped" else ""
        return ", ".join(filter(None, [f"{self.verdict} {after}{self.seconds:.0f} s", self.detail]))


def steps_table(outcomes: Mapping[str, Outcome]) -> str:
    rows = []
    for name, outcome in outcomes.items():
        seconds = "" if outcome.verdict == "not run" else f"{outcome.seconds:.0f} s"
        rows.append([name, outcome.verdict, seconds, outcome.detail])
    return aligned(["step", "", "time", ""], rows)


def speed_table(runs: Sequence[Path]) -> str:
    """Each case of those runs that are there; empty without any."""
    rows = [_case(result) for path in runs if path.exists() for result in read(path)["results"]]
    headings = ["op", "case", "ours", "as called", "over eager", "over best rival", "", "of ceiling"]
    return aligned(headings, rows) if rows else ""


def _case(result: Mapping[str, Any]) -> list[str]:
    ours, rivals = ours_and_rivals(result)
    if ours is None or ours["median_ms"] is None:
        why = "not measured" if ours is None else f"{ours['status']}: {ours['reason'][:60]}"
        return [result["op"], result["case"], why, "", "", "", "", ""]
    best = min(rivals, key=lambda row: row["median_ms"], default=None)
    eager = next((row for row in rivals if row["contestant"].startswith("eager")), None)
    share = ours["share_of_ceiling"]
    return [
        result["op"],
        result["case"],
        f"{ours['median_ms']:.4g} ms",
        f"{ours['as_called_ms']:.4g} ms" if ours["replayed"] else "–",
        f"{eager['speed_up_of_ours']:.2f}×" if eager else "–",
        f"{best['speed_up_of_ours']:.2f}×" if best else "–",
        best["contestant"] if best else "",
        "–" if share is None else f"{share:.0%}",
    ]


def aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns as wide as what they hold; no text of the last column is padded."""
    table = [headings, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in table)
