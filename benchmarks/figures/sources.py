"""Result files, of ``python -m benchmarks --json``, ``python -m models compare --json`` and ``benchmarks/dispatch``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .. import record
from ..cases import OURS
from ..results import Result, Row, curve

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """What one file has.

    Attributes:
        device: the processor or GPU, its threads, and the software, for people.
        commit: shortened; says so where files differed from it.
        date: of the day.
    """

    path: Path
    device: str
    commit: str
    date: str
    results: list[Result]


def read(path: Path) -> Source:
    """A run; a comparison: its phases are then the cases; or what calls cost. Of these two the op is the file's name.

    Raises:
        ValueError: naming the file, if it can't be read or is neither.
    """
    found = record.read_json(path)
    if isinstance(found, dict) and "phases" in found:
        return _comparison(path, found)
    if isinstance(found, dict) and "benchmarks" in found:
        return _calls(path, found)
    run = record.checked(path, found)
    machine = run["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cpu_capability']}, {_threads(machine['threads'])}"
    return _source(path, device, run["versions"]["torch"], run, [_result(result) for result in run["results"]])


def _comparison(path: Path, found: Mapping[str, Any]) -> Source:
    for key in ("date", "commit"):
        if key not in found:
            raise ValueError(f"{path}: has no {key}: `python -m models compare --json` must write it anew")
    machine = found["machine"]
    device = machine["processor"]
    if found["device"] == "cpu":
        device += f", {_threads(machine['threads'])}"
    results = [_phase(path.stem, phase, sides, found) for phase, sides in found["phases"].items()]
    return _source(path, device, machine["torch"], found, results)


def _calls(path: Path, found: Mapping[str, Any]) -> Source:
    """What pytest-benchmark wrote: of each call the fastest round, and what is left of it without the kernel."""
    machine, commit = found["machine_info"], found["commit_info"]
    about = {"commit": commit.get("id"), "modified": commit.get("dirty", False), "date": found["datetime"]}
    device = f"{machine['cpu']['brand_raw']}, {_threads(machine['threads'])}"
    results = []
    for call in found["benchmarks"]:
        whole, kernel = call["extra_info"]["seconds"], call["extra_info"]["kernel"]
        rows = [Row("call", 0.0, 0.0, ours=True, samples_ms=[1e3 * whole])]
        if kernel is not None:
            rows.append(Row("the rest", 0.0, 0.0, samples_ms=[1e3 * (whole - kernel)]))
        case = f"{call['params']['name']}; {call['group']}"
        results.append(Result(path.stem, case, "", "", None, 0, Row("none", 0.0, 0.0), rows))
    return _source(path, device, machine["torch"], about, results)


def _source(path: Path, device: str, torch: str, about: Mapping[str, Any], results: list[Result]) -> Source:
    device = device.replace("(R)", "").replace("(TM)", "")
    commit = (about["commit"] or "unknown")[:7] + (" with changes" if about["modified"] else "")
    return Source(path, f"{device}, PyTorch {torch.partition('+')[0]}", commit, about["date"][:10], results)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _result(found: Mapping[str, Any]) -> Result:
    growth = tuple(found["growth"]) if found["growth"] else None
    ceiling, rows = _made(Row, found["ceiling"]), [_made(Row, row) for row in found["rows"]]
    return _made(Result, {**found, "growth": growth, "ceiling": ceiling, "rows": rows})


def _made(kind: type[T], found: Mapping[str, Any]) -> T:
    """Of what a file has, the dataclass's own fields: the others are derived from them."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in found.items() if name in names})


def _phase(name: str, phase: str, sides: Mapping[str, Any], found: Mapping[str, Any]) -> Result:
    rows = [
        Row(contestant, 0.0, 0.0, ours, samples_ms=[1e3 * sides[side]["seconds"]], peak_bytes=sides[side]["peak"])
        for side, contestant, ours in (("reference", "PyTorch", False), ("kernels", OURS, True))
    ]
    if sides["speedup"] is None:  # the sides disagree, or no kernel of ours served
        rows[-1].status = "unavailable" if found["agree"] else "wrong"
        rows[-1].reason = "plain PyTorch served it" if found["agree"] else "it disagrees with plain PyTorch"
        rows[-1].samples_ms = []
    return Result(name, phase, "", found["dtype"], None, 0, Row("none", 0.0, 0.0), rows)


class Results:
    """The results of several files by ``case`` and by ``op: case``. Where two files have one, the later counts."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._by_name = {f"{r.op}: {r.case}": r for source in sources for r in source.results}

    def __getitem__(self, name: str) -> Result:
        """Raises a ValueError where there is no such case, or more than one."""
        found = [r for full, r in self._by_name.items() if name in (full, r.case)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"the case {name!r} is of {' and of '.join(r.op for r in found)}: write `op: case`")
        names = dict.fromkeys([*(r.case for r in self._by_name.values()), *self._by_name])
        close = difflib.get_close_matches(name, names, n=3, cutoff=0)
        raise ValueError(f"no file has the case {name!r}; closest: {', '.join(map(repr, close))}")

    def matching(self, pattern: str) -> list[str]:
        """What ``*`` stands for in each case that ``pattern`` fits. Raises a ValueError where it fits none."""
        head, _, tail = pattern.partition("*")
        found = []
        for full, result in self._by_name.items():
            for name in (result.case, full):
                if name.startswith(head) and name.endswith(tail) and len(name) >= len(head) + len(tail):
                    found.append(name[len(head) : len(name) - len(tail)])
                    break
        if not found:
            raise ValueError(f"no file has a case like {pattern!r}")
        return found

    def curve(self, result: Result) -> list[tuple[int, Result]]:
        """The growth curve of which ``result`` is a point, by size, as on the page."""
        if result.growth is None:
            return []
        like = [r for r in self._by_name.values() if (r.op, r.dtype) == (result.op, result.dtype)]
        return curve(like, result.growth[0])
