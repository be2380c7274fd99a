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

    Raises:
        ValueError: if there are no notes.
    """
    if not notes:
        raise ValueError(f"notes for {path} must be at least one, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    for note in notes:
        bar = FancyBboxPatch(
            (note.start / TICKS_PER_BEAT + 0.03, note.pitch - 0.36),
            max(note.duration / TICKS_PER_BEAT - 0.06, 0.04),
            0.72,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=colours[note.instrument],
            alpha=0.35 + 0.6 * note.velocity / 127,
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
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(colours), frameon=False, fontsize=9,
    )  # fmt: skip
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def _colours(instruments: Sequence[str]) -> dict[str, str]:
    """A colour an instrument: voices first, from the top down, always in the same ones."""
    voices = {voice: colour for voice, colour in _VOICE_COLOURS.items() if voice in instruments}
    others = [instrument for instrument in instruments if instrument not in voices]
    return voices | {name: _OTHER_COLOURS[i % len(_OTHER_COLOURS)] for i, name in enumerate(others)}
