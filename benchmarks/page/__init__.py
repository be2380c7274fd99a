"""Runs as one HTML page: a file that needs no other, reads well on a phone and in print, and has no script."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from models.atomic import replacing

from ..record import ours_and_rivals
from ..tables import bandwidth, bar_value, milliseconds, rate, times
from . import plots

Run = Mapping[str, Any]


@dataclass(frozen=True)
class SpeedUp:
    """One case of ours against the fastest of its rivals, and against eager PyTorch where that is another."""

    case: str
    shape: str
    ours_ms: float | None
    rate: str
    share: float | None
    rivals: Sequence[tuple[str, float]]  # name, how many times as fast ours is; the fastest rival first
    note: str


@dataclass(frozen=True)
class Picture:
    title: str
    source: str  # a data: URL


def write(path: Path, runs: Sequence[tuple[str, Run]], pictures: Sequence[Path] = ()) -> None:
    """Write the page of runs, each with the name of its file, and of pictures (PNG), whole or not at all.

    Raises:
        ValueError: naming the file, if a picture is missing or is no PNG.
    """
    speed_ups = _by_op(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    about = [_about(name, run) for name, run in runs]
    content = environment.get_template("page.html").render(
        runs=about,
        machines=list(dict.fromkeys(run["device"] for run in about)),
        cases=sum(run["cases"] for run in about),
        wrong=sum(run["wrong"] for run in about),
        failed=sum(run["failed"] for run in about),
        quick=any(run["quick"] for run in about),
        speed_ups=speed_ups,
        widest=max((ratio for cases in speed_ups.values() for case in cases for _, ratio in case.rivals), default=2.0),
        bars={name: run["bars"] for name, run in runs if run["bars"]},
        roofline=[Markup(svg) for svg in plots.rooflines([run for _, run in runs])],
        growth=[(title, Markup(svg)) for title, svg in plots.growth([run for _, run in runs])],
        layouts=[(title, Markup(svg)) for title, svg in plots.patterns()],
        pictures=[_picture(path) for path in pictures],
        value=lambda bar, value: bar_value(bar["unit"], value),
        width=_width,
        times=times,
        milliseconds=milliseconds,
    )
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _about(name: str, run: Run) -> dict[str, Any]:
    machine = run["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_capability']}"
    rows = [row for result in run["results"] for row in result["rows"]]
    return {
        "name": name,
        "device": device,
        "versions": ", ".join(f"{package} {version}" for package, version in run["versions"].items() if version),
        "commit": f"{str(run['commit'])[:9]}{' (with changes)' if run['modified'] else ''}",
        "date": run["date"][:16].replace("T", " "),
        "quick": run["quick"],
        "cases": len(run["results"]),
        "wrong": sum(row["status"] == "wrong" for row in rows),
        "failed": sum(row["status"] == "failed" for row in rows) + sum(map(_failed, run["results"])),
    }


def _failed(result: Mapping[str, Any]) -> bool:
    """Whether the case has no rows; what was kept of older runs doesn't say, for they ended there."""
    return bool(result.get("failure"))


def _by_op(runs: Sequence[tuple[str, Run]]) -> dict[str, list[SpeedUp]]:
    found: dict[str, list[SpeedUp]] = {}
    for _, run in runs:
        for result in run["results"]:
            found.setdefault(result["op"], []).append(_speed_up(result))
    return found


def _speed_up(result: Mapping[str, Any]) -> SpeedUp:
    ours, rivals = ours_and_rivals(result)
    rivals.sort(key=lambda row: row["median_ms"])
    shown = rivals[:1] + [row for row in rivals[1:] if row["contestant"].startswith("eager")]
    if ours is None or ours["median_ms"] is None:
        if _failed(result):
            note = f"failed: {result['failure']}"
        else:
            note = "not measured" if ours is None else f"{ours['status']}: {ours['reason']}"
        return SpeedUp(result["case"], result["shape"], None, "", None, [], note)
    by_bytes = result["ceiling"]["bytes"] > 0
    speed = bandwidth(ours["bytes_per_s"]) if by_bytes else rate(ours["flops_per_s"])
    pairs = [(row["contestant"], row["speed_up_of_ours"]) for row in shown]
    note = "" if pairs else "no rival could be timed"
    return SpeedUp(result["case"], result["shape"], ours["median_ms"], speed, ours["share_of_ceiling"], pairs, note)


def _width(faster: float, widest: float) -> str:
    """Of a bar, in per cent: 1 and less is nothing, ``widest`` is all."""
    return f"{100 * max(0.0, math.log(faster)) / max(math.log(widest), 1e-9):.1f}"


def _picture(path: Path) -> Picture:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{path}: must be a PNG picture")
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Picture(path.stem.replace("_", " "), source)
