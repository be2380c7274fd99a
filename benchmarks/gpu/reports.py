"""What a step's own report says, in a few words: files that it wrote, or the end of its log."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


def last_line(log: Path) -> str:
    """The last that has words."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if re.search(r"\w", line)]
    return lines[-1][:100] if lines else ""


def verified(log: Path) -> str:
    """The last line of ``verify``."""
    found = re.findall(r"^\d+ right, \d+ wrong$", log.read_text(errors="replace"), re.MULTILINE)
    return found[-1] if found else last_line(log)


def tested(report: Path) -> str:
    """The counts of a pytest report in JUnit's format."""
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return "pytest wrote no report"
    tests, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    wrong = f", {errors} errors" if errors else ""
    return f"{tests - failures - errors - skipped} passed, {failures} failed, {skipped} skipped{wrong}"


def sanitized(log: Path) -> str:
    """The errors that compute-sanitizer counted, of each process that it watched, and what ``verify`` found."""
    text = log.read_text(errors="replace")
    counts = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    counts += [errors for errors, _ in re.findall(r"RACECHECK SUMMARY: .*?\((\d+) errors?, (\d+) warning", text)]
    if not counts:
        return f"no summary: {last_line(log)}"
    return f"{sum(map(int, counts))} errors; {verified(log)}"


def measured(run: Path) -> str:
    """What a run of ``python -m benchmarks`` has."""
    found = _json(run)
    if found is None:
        return "no case was measured"
    rows = [row for result in found["results"] for row in result["rows"]]
    cases, wrong = len(found["results"]), sum(row["status"] == "wrong" for row in rows)
    failed = sum(row["status"] == "failed" for row in rows) + sum(bool(r["failure"]) for r in found["results"])
    more = ", no time for more" if found["cut_short"] else ""
    bad = ", ".join(f"{count} {what}" for count, what in ((wrong, "wrong"), (failed, "failed")) if count)
    return f"{cases} case{'s' * (cases != 1)}{more}" + (f"; {bad}" if bad else "")


def compared(comparison: Path) -> str:
    """What ``python -m models compare`` found."""
    found = _json(comparison)
    if found is None:
        return "nothing was compared"
    if not found["agree"]:
        return "the numbers differ"
    times = [f"{phase} {sides['speedup']:.1f}×" for phase, sides in found["phases"].items() if sides["speedup"]]
    return ", ".join(["agrees", *times])


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there; written whole, it is never half there
        return None
