"""The page's plots, as SVG that is part of it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from gdl_kernels import layouts
from gdl_kernels.layouts import Layout

from ..results import exponent

Run = Mapping[str, Any]

#: As wide as a phone, so that their letters are there as large as the page's.
WIDTH = 4.6

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters, not outlines: they can be searched, and take the page's font
    "svg.hashsalt": "gdl_kernels",  # or no two pages of one run would be the same
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#8a94a0",
    "figure.constrained_layout.use": True,
}

_COLOURS = (
    "#1f5fa8", "#c8553d", "#588157", "#8e6bbf", "#b08900", "#4a7c8c", "#a0416d", "#6b705c", "#2a9d8f", "#7d4f2a"
)  # fmt: skip
_ROOF = "#333b44"
_MARKERS = "osD^vP*Xhd"


def _look(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = file.getvalue()
    return text[text.index("<svg") :]  # without the head that a file of its own would have


def rooflines(runs: Sequence[Run]) -> list[str]:
    """One plot a machine: what ours reach, by the arithmetic that a byte of theirs needs, under the machine's roofs.

    The roofs are the fastest copy or read and the fastest matrix products of the runs themselves. What has no count of
    operations or of bytes has no place there.
    """
    machines: dict[str, list[Run]] = {}
    for run in runs:
        machines.setdefault(run["machine"]["gpu"] or run["machine"]["cpu"], []).append(run)
    return [svg for machine, of in machines.items() if (svg := _roofline(machine, of)) is not None]


def _roofline(machine: str, runs: Sequence[Run]) -> str | None:
    results = [result for run in runs for result in run["results"]]
    memory: tuple[float, str] | None = None  # bytes a second, and whether a copy or a read had them
    products: dict[str, float] = {}
    for result in results:
        ceiling = result["ceiling"]
        if ceiling["median_ms"] is None:
            continue
        if ceiling["bytes"]:
            found = ceiling["bytes_per_s"], ceiling["contestant"].partition(" ")[0]
            memory = found if memory is None else max(memory, found)
        else:
            dtype = "float32" if "float32" in ceiling["contestant"] else result["dtype"]
            products[dtype] = max(products.get(dtype, 0.0), ceiling["flops_per_s"])
    points: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        row = next((row for row in result["rows"] if row["ours"] and row["median_ms"]), None)
        if row is not None and row["flops"] and row["bytes"]:
            points.setdefault(result["op"], []).append((row["flops"] / row["bytes"], row["flops_per_s"] / 1e9))
    if not points:
        return None
    intensities = [x for of in points.values() for x, _ in of]
    least = min(intensities) / 2
    knees = {dtype: max(least, peak / memory[0]) if memory else least for dtype, peak in products.items()}
    most = 2 * max([*intensities, *knees.values()])
    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 3.6))
        axes = figure.add_subplot(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
        for dtype, knee in knees.items():
            peak = products[dtype] / 1e9
            axes.plot([knee, most], [peak, peak], color=_ROOF, linewidth=1.2)
            axes.annotate(f"matrix product, {dtype}", (most, peak), ha="right", va="bottom", fontsize=8)
        if memory:
            bandwidth, kind = memory
            end = max(knees.values(), default=most)
            axes.plot([least, end], [least * bandwidth / 1e9, end * bandwidth / 1e9], color=_ROOF, linewidth=1.2)
            axes.annotate(
                kind, (least, least * bandwidth / 1e9), xytext=(0, 6), textcoords="offset points", ha="left", fontsize=8
            )
        for i, (op, of) in enumerate(points.items()):
            x, y = zip(*of)
            axes.scatter(x, y, s=18, label=op, alpha=0.8, **_look(i))
        axes.set_title(machine, fontsize=9)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        return _svg(figure)


def growth(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Each growth curve of each op and dtype: time and memory against size, with the exponents of their fits."""
    for run in runs:
        curves: dict[str, dict[int, Mapping[str, Any]]] = {}
        for result in run["results"]:
            if result["growth"]:
                name, size = result["growth"]
                curves.setdefault(f"{result['op']}: {name}, {result['dtype']}", {})[size] = result
        for title, curve in curves.items():
            if len(curve) > 1:
                yield title, _growth([curve[size] for size in sorted(curve)])


def _growth(results: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(row["contestant"] for result in results for row in result["rows"]))
    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 5.2))
        panels = figure.subplots(2, 1, sharex=True)
        for axes, key, unit, label in ((panels[0], "median_ms", 1.0, "ms"), (panels[1], "peak_bytes", 2**20, "MiB")):
            axes.set(xscale="log", yscale="log", ylabel=label)
            for i, name in enumerate(names):
                points = [
                    (result["growth"][1], row[key] / unit)
                    for result in results
                    for row in result["rows"]
                    if row["contestant"] == name and row[key]
                ]
                if not points:
                    continue
                power = exponent(points)
                fitted = name if power is None else f"{name}: n^{power:.2f}"
                axes.plot(*zip(*points), markersize=4, linewidth=1.2, label=fitted, **_look(i))
            axes.legend(fontsize=8, frameon=False)
        panels[1].set_xlabel(results[0]["growth"][0].rpartition(" over ")[2])
        return _svg(figure)


def patterns() -> Iterator[tuple[str, str]]:
    """The named patterns at a size at which single blocks show."""
    n, size = 512, 16
    named: dict[str, Layout] = {
        "local": layouts.local(n, 96, block_size=size),
        "strided": layouts.strided(n, 8, block_size=size),
        "fixed": layouts.fixed(n, 64, 16, block_size=size),
        "sliding with sinks": layouts.sliding_with_sinks(n, 96, 20, block_size=size),
    }
    for name, layout in named.items():
        with rc_context(_STYLE):
            yield name, _svg(layout.plot())
