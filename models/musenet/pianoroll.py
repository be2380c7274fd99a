"""Draws notes as a piano roll."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..atomic import replacing
from .tokens import TICKS_PER_BEAT, Note, pitch_name

_BLACK_KEYS = {1, 3, 6, 8, 10}
_VOICE_COLOURS = {"soprano": "#d1495b", "alto": "#edae49", "tenor": "#3a9a7e", "bass": "#2e5e8c"}
_OTHER_COLOURS = ("#7b5ea7", "#5c946e", "#b56576", "#4f86c6", "#c17c3a", "#5f6b76", "#9a8c3f", "#a05195")


def draw_piano_roll(notes: Sequence[Note], path: Path, *, title: str = "") -> None:
    """Draw notes as bars, time in beats from left to right, pitch upwards, a colour an instrument, to a PNG file.

    Instruments that sound a pitch at once share its height, the first in the legend on top.

    Raises:
        ValueError: if there are no notes.
    """
    if not notes:
        raise ValueError(f"notes for {path} must be at least one, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Patch

    beats = max(note.end for note in notes) / TICKS_PER_BEAT
    low, high = min(note.pitch for note in notes) - 2, max(note.pitch for note in notes) + 2
    figure = Figure(figsize=(min(max(9.0, beats * 0.28), 36.0), min(max(4.0, (high - low) * 0.16), 12.0)), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for pitch in range(low, high + 1):
        if pitch % 12 in _BLACK_KEYS:
            axes.axhspan(pitch - 0.5, pitch + 0.5, color="#f0f1f4", linewidth=0, zorder=0)
        if pitch % 12 == 0:
            axes.axhline(pitch - 0.5, color="#c6cad2", linewidth=0.8, zorder=1)
    colours = _colours(sorted({note.instrument for note in notes}))
    for note, (bottom, height) in zip(notes, _lanes(notes, list(colours))):
        strength = 0.4 + 0.6 * note.velocity / 127  # lightened, not transparent: what lies below must not mix in
        bar = FancyBboxPatch(
            (note.start / TICKS_PER_BEAT + 0.03, note.pitch + bottom),
            max(note.duration / TICKS_PER_BEAT - 0.06, 0.04),
            height,
            boxstyle=f"round,pad=0,rounding_size={height / 6}",
            facecolor=[1 - strength * (1 - part) for part in to_rgb(colours[note.instrument])],
            linewidth=0,
            zorder=3,
        )
        axes.add_patch(bar)
    axes.set_xlim(0, beats)
    axes.set_ylim(low - 0.5, high + 0.5)
    naturals = [pitch for pitch in range(low, high + 1) if pitch % 12 in (0, 4, 7)]
    axes.set_yticks(naturals, [pitch_name(pitch) for pitch in naturals], fontsize=8)
    bar_beats = 4 * max(1, math.ceil(beats / 4 / 24))  # at most 24 numbers below, each on a bar of four
    axes.set_xticks([beat for beat in range(0, math.ceil(beats) + 1, bar_beats) if beat <= beats])
    axes.grid(axis="x", color="#dde0e6", linewidth=0.8, zorder=1)
    axes.set_axisbelow(True)
    axes.set_xlabel("beats")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.legend(
        handles=[Patch(color=colour, label=name) for name, colour in colours.items()],
        loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4, ncols=min(len(colours), 8), frameon=False,
        fontsize=9,
    )  # fmt: skip
    if title:
        axes.set_title(title, loc="left", fontsize=11, pad=10, parse_math=False)  # a path may have a $
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def _lanes(notes: Sequence[Note], instruments: list[str]) -> list[tuple[float, float]]:
    """For each note the bottom of its bar, from the middle of its pitch, and the bar's height."""
    whole = 0.72
    same_pitch: dict[int, list[Note]] = {}
    for note in notes:
        same_pitch.setdefault(note.pitch, []).append(note)
    lanes = []
    for note in notes:
        sounding = {other.instrument for other in same_pitch[note.pitch]
                    if other.start < note.end and note.start < other.end}  # fmt: skip
        order = sorted(sounding | {note.instrument}, key=instruments.index, reverse=True)
        height = whole / len(order)
        lanes.append((order.index(note.instrument) * height - whole / 2, height))
    return lanes


def _colours(instruments: Sequence[str]) -> dict[str, str]:
    """A colour an instrument: voices first, from the top down, always in the same ones."""
    voices = {voice: colour for voice, colour in _VOICE_COLOURS.items() if voice in instruments}
    others = [instrument for instrument in instruments if instrument not in voices]
    return voices | {name: _OTHER_COLOURS[i % len(_OTHER_COLOURS)] for i, name in enumerate(others)}
