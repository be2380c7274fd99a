"""Harmonising chorales as a task: the soprano's line is the source, the bass's line the target.

A line is one token for each eighth note of time: what sounds when it begins, and whether that is a new note::

    begin:C4  hold:C4  begin:D4  rest

So both lines have the same length, and each token says a pitch, whatever came before. Of the chorales' 46,000 notes of
soprano and bass, some 200 begin off this grid: those are moved to the next eighth that they sound at, or lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..musenet.data import Piece
from ..musenet.tokens import TICKS_PER_BEAT, Note, pitch_name

PAD, START, END, REST = range(4)
_FIRST = 4

#: What sounds in the chorales, in every key that they are transposed to.
KEYS = range(-5, 7)
MELODY_PITCHES = range(52, 88)
BASS_PITCHES = range(31, 71)
_LOWEST = BASS_PITCHES.start
_SPAN = MELODY_PITCHES.stop - _LOWEST

#: Tokens that there are; both lines share them.
VOCABULARY = _FIRST + 2 * _SPAN

TICKS_PER_STEP = TICKS_PER_BEAT // 2


def encode(notes: Iterable[Note], steps: int | None = None) -> list[int]:
    """A line of notes to tokens; of several that sound at once, the one that began last.

    Args:
        steps: how many tokens; default as many as the notes last.

    Raises:
        ValueError: if a note is lower or higher than any token.
    """
    line = sorted(notes)
    sounding: list[Note | None] = [None] * (_steps(line) if steps is None else steps)
    for note in line:
        if not _LOWEST <= note.pitch < _LOWEST + _SPAN:
            low, high = pitch_name(_LOWEST), pitch_name(_LOWEST + _SPAN - 1)
            raise ValueError(f"a note must be from {low} to {high}, got {pitch_name(note.pitch)}")
        for step in _sounds_at(note):
            if step < len(sounding):
                sounding[step] = note
    tokens = []
    before = None
    for now in sounding:
        tokens.append(REST if now is None else _FIRST + now.pitch - _LOWEST + (_SPAN if now is before else 0))
        before = now
    return tokens


def decode(tokens: Iterable[int], voice: str) -> list[Note]:
    """Tokens to notes. A model's mistakes decode, too: a note that is held and has not begun begins there."""
    notes: list[Note] = []
    begun, pitch, step = 0, 0, 0  # pitch 0 is none
    for step, token in enumerate([*tokens, REST]):
        now = pitch_of(token)
        if pitch and (now != pitch or not is_hold(token)):
            notes.append(Note(begun * TICKS_PER_STEP, (step - begun) * TICKS_PER_STEP, voice, pitch))
            pitch = 0
        if now and not pitch:
            begun, pitch = step, now
    return notes


def _steps(notes: Iterable[Note]) -> int:
    """How many steps notes last."""
    return -(-max((note.end for note in notes), default=0) // TICKS_PER_STEP)


def _sounds_at(note: Note) -> range:
    """The steps at whose beginning a note sounds."""
    return range(-(-note.start // TICKS_PER_STEP), -(-note.end // TICKS_PER_STEP))


def pitch_of(token: int) -> int:
    """The MIDI pitch that a token says; 0 where it says none."""
    return _LOWEST + (token - _FIRST) % _SPAN if token >= _FIRST else 0


def is_hold(token: int) -> bool:
    return token >= _FIRST + _SPAN


def pitches(tokens: Tensor) -> Tensor:
    """:func:`pitch_of` each."""
    return torch.where(tokens >= _FIRST, _LOWEST + (tokens - _FIRST) % _SPAN, 0)


def begins(tokens: Tensor) -> Tensor:
    """Where a note begins: bool, of the shape of ``tokens``."""
    return (tokens >= _FIRST) & (tokens < _FIRST + _SPAN)


def transpose(tokens: Tensor, semitones: int) -> Tensor:
    """The same line in one of ``KEYS``."""
    return torch.where(tokens >= _FIRST, tokens + semitones, tokens)


@dataclass(frozen=True)
class Harmony:
    """A melody and its bass: int64 ``(steps,)`` each."""

    name: str
    melody: Tensor
    bass: Tensor
    held_out: bool

    def transposed(self, semitones: int) -> Harmony:
        return Harmony(self.name, transpose(self.melody, semitones), transpose(self.bass, semitones), self.held_out)

    def excerpt(self, start: int, steps: int) -> Harmony:
        part = slice(start, start + steps)
        return Harmony(self.name, self.melody[part], self.bass[part], self.held_out)


def harmonies(pieces: Sequence[Piece]) -> list[Harmony]:
    """The outer voices of pieces."""
    found = []
    for piece in pieces:
        lines = [[note for note in piece.notes if note.instrument == voice] for voice in ("soprano", "bass")]
        steps = max(map(_steps, lines))
        melody, bass = (torch.tensor(encode(line, steps)) for line in lines)
        found.append(Harmony(piece.name, melody, bass, piece.held_out))
    return found


@dataclass(frozen=True)
class Batch:
    """Harmonies side by side, padded at their ends.

    Attributes:
        source: int64 ``(B, S)``, melodies.
        padding: bool ``(B, S)``.
        target: int64 ``(B, S + 1)``, ``START`` and the bass.
        following: int64 ``(B, S + 1)``, what follows each of ``target``: the bass and ``END``.
    """

    source: Tensor
    padding: Tensor
    target: Tensor
    following: Tensor

    @classmethod
    def of(cls, harmonies: Sequence[Harmony]) -> Batch:
        source = padded([harmony.melody for harmony in harmonies])
        start, end = torch.tensor([START]), torch.tensor([END])
        return cls(
            source,
            source == PAD,
            padded([torch.cat([start, harmony.bass]) for harmony in harmonies]),
            padded([torch.cat([harmony.bass, end]) for harmony in harmonies]),
        )


def padded(lines: Sequence[Tensor]) -> Tensor:
    """Lines side by side: int64 ``(B, longest)``."""
    return torch.nn.utils.rnn.pad_sequence(list(lines), batch_first=True, padding_value=PAD)


class Batches:
    """Endless random batches for training, each harmony in a random key.

    Everything random comes from ``generator``: with its state saved, batches go on as if never interrupted.
    """

    #: So many batches are drawn at once and sorted by length, so that one has little padding; one of them is given out.
    SORTED = 4

    def __init__(
        self, harmonies: Sequence[Harmony], length: int, batch: int, generator: torch.Generator, *, transpose: bool
    ) -> None:
        """``length`` is the most steps of a harmony; of a longer one, a part is drawn."""
        if not harmonies:
            raise ValueError("harmonies must be at least one, got none")
        self.harmonies, self.length, self.batch = harmonies, length, batch
        self.generator, self.transpose = generator, transpose

    def __iter__(self) -> Iterator[Batch]:
        while True:
            drawn = [self._excerpt() for _ in range(self.SORTED * self.batch)]
            drawn.sort(key=lambda harmony: len(harmony.melody))
            yield Batch.of(drawn[self._draw(self.SORTED) * self.batch :][: self.batch])

    def _excerpt(self) -> Harmony:
        harmony = self.harmonies[self._draw(len(self.harmonies))]
        if (more := len(harmony.melody) - self.length) > 0:
            harmony = harmony.excerpt(self._draw(more + 1), self.length)
        return harmony.transposed(KEYS[self._draw(len(KEYS))]) if self.transpose else harmony

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))


class Baseline:
    """The bass pitch that is the most frequent in some harmonies: of all, or where the melody has a given pitch."""

    def __init__(self, harmonies: Sequence[Harmony], *, given_melody: bool) -> None:
        self.given_melody = given_melody
        counts: dict[int, Counter[int]] = {}
        for harmony in harmonies:
            for above, below in zip(self._given(harmony.melody), pitches(harmony.bass).tolist()):
                if below:
                    counts.setdefault(above, Counter())[below] += 1
        self.bass = {above: counter.most_common(1)[0][0] for above, counter in counts.items()}
        self.any = sum(counts.values(), Counter()).most_common(1)[0][0]

    def __call__(self, melody: Tensor) -> Tensor:
        """A bass pitch for each token of a melody; a melody pitch that was not there has that of all."""
        return torch.tensor([self.bass.get(above, self.any) for above in self._given(melody)])

    def _given(self, melody: Tensor) -> list[int]:
        return pitches(melody).tolist() if self.given_melody else [0] * len(melody)
