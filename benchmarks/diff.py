"""What differs between two runs beyond their noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

#: A smaller change than this is none, however steady both runs were: one build, run twice, differs by as much.
LEAST_CHANGE = 0.05

#: Memory that grew by less is a page or an allocator's rounding.
LEAST_BYTES = 2**20

#: Half the width of the interval about a median, in interquartile ranges over the root of the number of samples. Where
#: two such intervals don't overlap, the medians differ at about the 95 % level (McGill, Tukey and Larsen 1978).
NOTCH = 1.57

What = Literal["time", "share of ceiling", "memory", "status", "bar"]


@dataclass(frozen=True)
class Change:
    """One quantity of one row in two runs.

    Attributes:
        before, after: milliseconds, shares of the ceiling, bytes, what a bar measured; or a row's status.
        better: whether ``after`` is.
    """

    case: str
    contestant: str
    what: What
    before: float | str
    after: float | str
    better: bool


def same_machine(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether milliseconds of the two can be compared: one processor, one number of threads, one GPU or none."""
    return all(before["machine"].get(key) == after["machine"].get(key) for key in ("cpu", "cores", "threads", "gpu"))


def compared_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """How many rows both runs have."""
    return len(_rows(before).keys() & _rows(after).keys())


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Every row's changes beyond noise, and the bars that only one run meets. Rows that only one run has are left out.

    On one machine times are compared; between two machines each row's share of its own machine's ceiling.
    """
    here = same_machine(before, after)
    old, new = _rows(before), _rows(after)
    found: list[Change] = []
    for key in old.keys() & new.keys():
        (result, row), (result_after, row_after) = old[key], new[key]
        if row["status"] != row_after["status"]:
            found.append(Change(*key, "status", row["status"], row_after["status"], row_after["status"] == "timed"))
        elif row.get("replayed", False) != row_after.get("replayed", False):
            pass  # one is the GPU's time alone, the other has the host's in it
        elif here:
            found += _beyond_noise(key, "time", row["samples_ms"], row_after["samples_ms"], lower_is_better=True)
        else:
            shares = _shares(result, row), _shares(result_after, row_after)
            found += _beyond_noise(key, "share of ceiling", *shares, lower_is_better=False)
        found += _memory(key, row["peak_bytes"], row_after["peak_bytes"])
    bars = {bar["claim"]: bar for bar in after["bars"]}
    for bar in before["bars"]:
        now = bars.get(bar["claim"])
        if now is not None and None not in (bar["met"], now["met"]) and bar["met"] != now["met"]:
            found.append(Change(bar["claim"], "", "bar", bar["measured"], now["measured"], now["met"]))
    place = {key: i for i, key in enumerate(old)}  # bars, which are in no row, come last
    return sorted(found, key=lambda change: place.get((change.case, change.contestant), len(place)))


def _rows(run: Mapping[str, Any]) -> dict[tuple[str, str], tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """By case and contestant: the case's result and the row."""
    return {
        (f"{result['op']}: {result['case']}", row["contestant"]): (result, row)
        for result in run["results"]
        for row in (result["ceiling"], *result["rows"])
    }


def _shares(result: Mapping[str, Any], row: Mapping[str, Any]) -> list[float]:
    """The row's share of the ceiling in each round; the last samples of both are of one round."""
    ceiling = result["ceiling"]
    kind = "bytes" if ceiling["bytes"] else "flops"
    work = row[kind] / ceiling[kind]
    return [work * top / own for top, own in zip(reversed(ceiling["samples_ms"]), reversed(row["samples_ms"]))]


def _beyond_noise(
    key: tuple[str, str], what: What, before: Sequence[float], after: Sequence[float], *, lower_is_better: bool
) -> list[Change]:
    if not before or not after:
        return []
    old, new = statistics.median(before), statistics.median(after)
    noise = _half_width(before) + _half_width(after)
    if abs(new - old) <= noise or abs(math.log(new / old)) < math.log1p(LEAST_CHANGE):
        return []
    return [Change(*key, what, old, new, (new < old) is lower_is_better)]


def _half_width(samples: Sequence[float]) -> float:
    """Of the interval about the median. One sample alone says nothing of the noise, so it may be anything."""
    if len(samples) < 2:
        return math.inf
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return NOTCH * (high - low) / math.sqrt(len(samples))


def _memory(key: tuple[str, str], before: int | None, after: int | None) -> list[Change]:
    if before is None or after is None or abs(after - before) <= max(LEAST_BYTES, LEAST_CHANGE * before):
        return []
    return [Change(*key, "memory", before, after, after < before)]
