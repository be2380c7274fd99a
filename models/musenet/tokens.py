"""Music as tokens, MuseNet's way.

One token is an instrument, a velocity and a pitch together, as in ``soprano:v80:C5``; velocity 0 ends the note.
``wait:N`` lets N ticks pass. A piece is ``start``, then these, then ``end``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: Ticks in a quarter note: every duration of the chorales, and triplets, fall on this grid exactly.
TICKS_PER_BEAT = 24

PITCHES = 128
_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


def pitch_name(pitch: int) -> str:
    """``60`` is ``"C4"``."""
    return f"{_NAMES[pitch % 12]}{pitch // 12 - 1}"


@dataclass(frozen=True, order=True)
class Note:
    """A note; ``start`` and ``duration`` in ticks."""

    start: int
    duration: int
    instrument: str
    pitch: int
    velocity: int = 80

    @property
    def end(self) -> int:
        return self.start + self.duration


def check_note(note: Note) -> None:
    """Raise a ValueError if neither MIDI nor a token can say the note."""
    if not 0 <= note.pitch < PITCHES:
        raise ValueError(f"a note's pitch must be from 0 to {PITCHES - 1}, got {note.pitch}")
    if not 1 <= note.velocity <= 127:
        raise ValueError(f"a note's velocity must be from 1 to 127, got {note.velocity}")
    if note.start < 0 or note.duration < 1:
        raise ValueError(f"a note must start at tick 0 or later and last a tick or more, got {note}")


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens there are, in this order: start, end, the waits, then instrument x velocity x pitch.

    Attributes:
        instruments: their names.
        velocities: the velocities that a note can begin with, ascending, from 1 to 127. Others go to the nearest.
        longest_wait: in ticks; a longer wait takes several tokens.
    """

    instruments: tuple[str, ...]
    velocities: tuple[int, ...] = (80,)
    longest_wait: int = 4 * TICKS_PER_BEAT

    def __post_init__(self) -> None:
        if not self.instruments or len(set(self.instruments)) < len(self.instruments):
            raise ValueError(f"instruments must be one or more different names, got {self.instruments}")
        if not self.velocities or list(self.velocities) != sorted(set(self.velocities)):
            raise ValueError(f"velocities must be ascending, got {self.velocities}")
        if not 1 <= self.velocities[0] <= self.velocities[-1] <= 127:
            raise ValueError(f"velocities must be from 1 to 127, got {self.velocities}")
        if self.longest_wait < 1:
            raise ValueError(f"longest_wait must be at least 1 tick, got {self.longest_wait}")

    start = 0
    end = 1
    first_wait = 2

    @property
    def first_note(self) -> int:
        return self.first_wait + self.longest_wait

    @cached_property
    def levels(self) -> tuple[int, ...]:
        return (0, *self.velocities)

    def __len__(self) -> int:
        return self.first_note + len(self.instruments) * len(self.levels) * PITCHES

    def note_token(self, instrument: str, velocity: int, pitch: int) -> int:
        line = self.instruments.index(instrument) * len(self.levels) + self.levels.index(velocity)
        return self.first_note + line * PITCHES + pitch

    def event(self, token: int) -> tuple[str, int, int]:
        """The instrument, velocity and pitch of a note's token."""
        line, pitch = divmod(token - self.first_note, PITCHES)
        instrument, level = divmod(line, len(self.levels))
        return self.instruments[instrument], self.levels[level], pitch

    def name(self, token: int) -> str:
        """The token as a person reads it."""
        self._check(token)
        if token < self.first_wait:
            return ("start", "end")[token]
        if token < self.first_note:
            return f"wait:{token - self.first_wait + 1}"
        instrument, velocity, pitch = self.event(token)
        return f"{instrument}:v{velocity}:{pitch_name(pitch)}"

    def encode(self, notes: Iterable[Note]) -> list[int]:
        """Notes to tokens, in time order; at one tick, ends come before beginnings.

        An instrument sounds a pitch once at a time: a note that begins while the same pitch sounds ends the earlier
        one, and of two that begin together the longer is kept.

        Raises:
            ValueError: if a note has an instrument, pitch, velocity, start or duration that no token can say.
        """
        events: list[tuple[int, int, int]] = []  # tick, 0 for an end and 1 for a beginning, token
        for note, end in self._separate(notes):
            velocity = min(self.velocities, key=lambda level: abs(level - note.velocity))
            events.append((note.start, 1, self.note_token(note.instrument, velocity, note.pitch)))
            events.append((end, 0, self.note_token(note.instrument, 0, note.pitch)))
        tokens, now = [self.start], 0
        for tick, _, token in sorted(events):
            while now < tick:
                wait = min(tick - now, self.longest_wait)
                tokens.append(self.first_wait + wait - 1)
                now += wait
            tokens.append(token)
        return [*tokens, self.end]

    def decode(self, tokens: Iterable[int]) -> list[Note]:
        """Tokens to notes, in order of time. Of several pieces on end, the first.

        Any tokens decode, a model's mistakes too: the end of a note that does not sound is passed over, a pitch that
        is begun again ends first, and what still sounds when the tokens are over ends there. Notes of no length are
        dropped.

        Raises:
            ValueError: if a token is not in the vocabulary.
        """
        notes, now = [], 0
        sounding: dict[tuple[str, int], tuple[int, int]] = {}  # start and velocity
        for token in tokens:
            self._check(token)
            if token == self.end:
                break
            if token == self.start:
                continue
            if token < self.first_note:
                now += token - self.first_wait + 1
                continue
            instrument, velocity, pitch = self.event(token)
            begun = sounding.pop((instrument, pitch), None)
            if begun is not None and begun[0] < now:
                notes.append(Note(begun[0], now - begun[0], instrument, pitch, begun[1]))
            if velocity:
                sounding[instrument, pitch] = now, velocity
        for (instrument, pitch), (start, velocity) in sounding.items():
            if start < now:
                notes.append(Note(start, now - start, instrument, pitch, velocity))
        return sorted(notes)

    def transpose(self, tokens: Tensor, semitones: int) -> Tensor:
        """The same music in another key; pitches that would leave 0 to 127 stay within their octave of the edge."""
        is_note = tokens >= self.first_note
        pitch = (tokens - self.first_note) % PITCHES
        moved = pitch + semitones
        moved = torch.where(moved < 0, moved + 12, torch.where(moved >= PITCHES, moved - 12, moved))
        return torch.where(is_note, tokens - pitch + moved, tokens)

    def _separate(self, notes: Iterable[Note]) -> list[tuple[Note, int]]:
        """Each note and the tick where it has to end, so that no instrument sounds a pitch twice at a time."""
        lines: dict[tuple[str, int], dict[int, Note]] = {}
        for note in sorted(notes):
            self._check_note(note)
            lines.setdefault((note.instrument, note.pitch), {})[note.start] = note  # the longest of a tick comes last
        separate = []
        for line in lines.values():
            following: Sequence[int | None] = [*list(line)[1:], None]
            for note, after in zip(line.values(), following):
                separate.append((note, note.end if after is None else min(note.end, after)))
        return separate

    def _check(self, token: int) -> None:
        if not 0 <= token < len(self):
            raise ValueError(f"a token must be from 0 to {len(self) - 1}, got {token}")

    def _check_note(self, note: Note) -> None:
        if note.instrument not in self.instruments:
            names = ", ".join(self.instruments)
            raise ValueError(f"a note's instrument must be one of {names}, got {note.instrument!r}")
        check_note(note)


#: The four voices of a chorale, at one velocity, which is all that their scores say.
CHORALES = Vocabulary(instruments=("soprano", "alto", "tenor", "bass"))
