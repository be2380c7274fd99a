"""What can be counted of music: its key, how much of it is in that key, how varied its pitches and note lengths are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from .tokens import DRUMS, TICKS_PER_BEAT, Note

#: How well each semitone above the tonic fits a key, by Krumhansl and Kessler's listeners (Psychological Review, 1982).
PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}

#: Semitones above the tonic. Minor has its leading tone besides the seventh, for every cadence in it uses that.
SCALES = {"major": frozenset({0, 2, 4, 5, 7, 9, 11}), "minor": frozenset({0, 2, 3, 5, 7, 8, 10, 11})}

_TONICS = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")


@dataclass(frozen=True)
class Key:
    tonic: int  # 0 is C
    mode: str  # major or minor

    @property
    def name(self) -> str:
        return f"{_TONICS[self.tonic]} {self.mode}"

    @property
    def scale(self) -> frozenset[int]:
        """Its pitch classes."""
        return frozenset((self.tonic + step) % 12 for step in SCALES[self.mode])


@dataclass(frozen=True)
class Statistics:
    """Of a piece; or, of a corpus, the means of its pieces'.

    Attributes:
        in_key: the share of its notes whose pitches are in the scale of its :func:`key`.
        pitch_class_entropy: in bits, of how often each of the 12 pitch classes begins: at most log2 12, 3.58.
        length: the mean of its notes' lengths, in beats.
        length_entropy: in bits, of how often each length is met.
    """

    in_key: float
    pitch_class_entropy: float
    length: float
    length_entropy: float


def key(notes: Iterable[Note]) -> Key:
    """The key whose profile fits best (Krumhansl and Schmuckler): the one that correlates most with how long each
    pitch class sounds in all.

    Raises:
        ValueError: if there is no note that has a pitch.
    """
    sounding = [0.0] * 12
    for note in _pitched(notes):
        sounding[note.pitch % 12] += note.duration
    return max(
        (Key(tonic, mode) for mode in PROFILES for tonic in range(12)),
        key=lambda key: _correlation(sounding[key.tonic :] + sounding[: key.tonic], PROFILES[key.mode]),
    )


def measure(notes: Iterable[Note]) -> Statistics:
    """A piece's statistics, drums apart.

    Raises:
        ValueError: if there is no note that has a pitch.
    """
    pitched = _pitched(notes)
    scale = key(pitched).scale
    return Statistics(
        in_key=sum(note.pitch % 12 in scale for note in pitched) / len(pitched),
        pitch_class_entropy=_entropy(Counter(note.pitch % 12 for note in pitched)),
        length=sum(note.duration for note in pitched) / len(pitched) / TICKS_PER_BEAT,
        length_entropy=_entropy(Counter(note.duration for note in pitched)),
    )


def mean(pieces: Sequence[Statistics]) -> Statistics:
    """A corpus's statistics.

    Raises:
        ValueError: if it has no piece.
    """
    if not pieces:
        raise ValueError("pieces must be at least one, got none")
    return Statistics(*(sum(values) / len(pieces) for values in zip(*map(astuple, pieces))))


def has_pitch(notes: Iterable[Note]) -> bool:
    """Whether there is a note besides those of drums."""
    return any(note.instrument != DRUMS for note in notes)


def _pitched(notes: Iterable[Note]) -> list[Note]:
    pitched = [note for note in notes if note.instrument != DRUMS]
    if not pitched:
        raise ValueError("notes must have at least one that has a pitch, got none")
    return pitched


def _entropy(counts: Counter[int]) -> float:
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; 0 where one is constant."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    shared = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    spread = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    return shared / spread if spread else 0.0
