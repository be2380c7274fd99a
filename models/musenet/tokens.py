"""Music as tokens, MuseNet's way.

One token is an instrument, a velocity and a pitch together, as in ``soprano:v80:C5``; velocity 0 ends the note.
``wait:N`` lets N ticks pass, and ``tempo:N`` says how many beats a minute has from there on. A piece is ``start``; then
its conditions, ``by:COMPOSER`` and ``with:INSTRUMENT`` for each that plays; then the music; then ``end``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: Ticks in a quarter note: every duration of the chorales, and triplets, fall on this grid exactly.
TICKS_PER_BEAT = 24

PITCHES = 128

#: The instrument whose pitches are the pieces of a kit: they mean the same in every key.
DRUMS = "drums"

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


@dataclass(frozen=True, order=True)
class Tempo:
    """From ``start``, in ticks, a minute has this many beats."""

    start: int
    beats_per_minute: float


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens there are, in this order: start, end, waits, tempos, composers, instrumentation, and
    instrument x velocity x pitch.

    Attributes:
        instruments: their names.
        velocities: the velocities that a note can begin with, ascending, from 1 to 127. Others go to the nearest.
        longest_wait: in ticks; a longer wait takes several tokens.
        tempos: in beats a minute, ascending. Others go to the nearest in ratio. With none, tempo is not said.
        composers: their names. With none, composers are not said.
        instrumentation: whether there is a token for each instrument that says that it plays.
    """

    instruments: tuple[str, ...]
    velocities: tuple[int, ...] = (80,)
    longest_wait: int = 4 * TICKS_PER_BEAT
    tempos: tuple[int, ...] = ()
    composers: tuple[str, ...] = ()
    instrumentation: bool = False

    def __post_init__(self) -> None:
        if not self.instruments or len(set(self.instruments)) < len(self.instruments):
            raise ValueError(f"instruments must be one or more different names, got {self.instruments}")
        if not self.velocities or list(self.velocities) != sorted(set(self.velocities)):
            raise ValueError(f"velocities must be ascending, got {self.velocities}")
        if not 1 <= self.velocities[0] <= self.velocities[-1] <= 127:
            raise ValueError(f"velocities must be from 1 to 127, got {self.velocities}")
        if self.longest_wait < 1:
            raise ValueError(f"longest_wait must be at least 1 tick, got {self.longest_wait}")
        if list(self.tempos) != sorted(set(self.tempos)) or (self.tempos and self.tempos[0] < 1):
            raise ValueError(f"tempos must be ascending and at least 1, got {self.tempos}")
        if len(set(self.composers)) < len(self.composers):
            raise ValueError(f"composers must be different names, got {self.composers}")

    start = 0
    end = 1
    first_wait = 2

    @cached_property
    def first_tempo(self) -> int:
        return self.first_wait + self.longest_wait

    @cached_property
    def first_composer(self) -> int:
        return self.first_tempo + len(self.tempos)

    @cached_property
    def first_instrument(self) -> int:
        return self.first_composer + len(self.composers)

    @cached_property
    def first_note(self) -> int:
        return self.first_instrument + (len(self.instruments) if self.instrumentation else 0)

    @cached_property
    def levels(self) -> tuple[int, ...]:
        return (0, *self.velocities)

    def __len__(self) -> int:
        return self.first_note + len(self.instruments) * len(self.levels) * PITCHES

    def note_token(self, instrument: str, velocity: int, pitch: int) -> int:
        line = self.instruments.index(instrument) * len(self.levels) + self.levels.index(velocity)
        return self.first_note + line * PITCHES + pitch

    def tempo_token(self, beats_per_minute: float) -> int:
        """The token of the nearest tempo, in ratio: 90 is as far from 60 as from 135."""
        nearest = min(self.tempos, key=lambda level: abs(math.log(level / beats_per_minute)))
        return self.first_tempo + self.tempos.index(nearest)

    def conditions(self, *, composer: str | None = None, instruments: Iterable[str] | None = None) -> list[int]:
        """The tokens that follow ``start`` and say who wrote a piece and what plays in it; None leaves it open.

        Raises:
            ValueError: if the vocabulary has no token for the composer or an instrument.
        """
        tokens = []
        if composer is not None:
            if composer not in self.composers:
                known = ", ".join(self.composers) or "none, for this vocabulary has no composers"
                raise ValueError(f"composer must be one of {known}; got {composer!r}")
            tokens.append(self.first_composer + self.composers.index(composer))
        if instruments is not None:
            if not self.instrumentation:
                raise ValueError("instruments can't be asked for: this vocabulary has no tokens of instrumentation")
            asked = set(instruments)
            if unknown := sorted(asked - set(self.instruments)):
                raise ValueError(f"instruments must be of {', '.join(self.instruments)}, got {unknown[0]!r}")
            tokens += [self.first_instrument + i for i, name in enumerate(self.instruments) if name in asked]
        return tokens

    def event(self, token: int) -> tuple[str, int, int]:
        """The instrument, velocity and pitch of a note's token."""
        line, pitch = divmod(token - self.first_note, PITCHES)
        instrument, level = divmod(line, len(self.levels))
        return self.instruments[instrument], self.levels[level], pitch

    def name(self, token: int) -> str:
        """The token as a person reads it."""
        self.check(token)
        if token < self.first_wait:
            return ("start", "end")[token]
        if token < self.first_tempo:
            return f"wait:{token - self.first_wait + 1}"
        if token < self.first_composer:
            return f"tempo:{self.tempos[token - self.first_tempo]}"
        if token < self.first_instrument:
            return f"by:{self.composers[token - self.first_composer]}"
        if token < self.first_note:
            return f"with:{self.instruments[token - self.first_instrument]}"
        instrument, velocity, pitch = self.event(token)
        return f"{instrument}:v{velocity}:{pitch_name(pitch)}"

    def encode(self, notes: Iterable[Note], *, tempos: Iterable[Tempo] = (), composer: str | None = None) -> list[int]:
        """A piece to tokens, in time order; at one tick a tempo comes first, then ends, then beginnings.

        An instrument sounds a pitch once at a time: a note that begins while the same pitch sounds ends the earlier
        one, and of two that begin together the longer is kept. A tempo is said where its nearest level is a new one,
        until the last note ends; by a vocabulary without tempos it is not. Instrumentation is that of the notes.

        Raises:
            ValueError: if a note has an instrument, pitch, velocity, start or duration that no token can say, a tempo
                is not positive, or the composer is none of the vocabulary's.
        """
        separate = self._separate(notes)
        playing = {note.instrument for note, _ in separate} if self.instrumentation else None
        events: list[tuple[int, int, int]] = []  # tick; 0 for a tempo, 1 for an end, 2 for a beginning; token
        for note, end in separate:
            velocity = min(self.velocities, key=lambda level: abs(level - note.velocity))
            events.append((note.start, 2, self.note_token(note.instrument, velocity, note.pitch)))
            events.append((end, 1, self.note_token(note.instrument, 0, note.pitch)))
        if self.tempos:
            over = max((end for _, end in separate), default=0)
            events += [(start, 0, token) for start, token in self._tempo_changes(tempos) if start < over]
        tokens, now = [self.start, *self.conditions(composer=composer, instruments=playing)], 0
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
        dropped. Conditions are passed over, wherever they are.

        Raises:
            ValueError: if a token is not in the vocabulary.
        """
        notes, now = [], 0
        sounding: dict[tuple[str, int], tuple[int, int]] = {}  # start and velocity
        for tick, token in self._timed(tokens):
            now = tick
            if token < self.first_note:
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

    def decode_tempos(self, tokens: Iterable[int]) -> list[Tempo]:
        """The tempos of tokens, each where it changes. Of several pieces on end, the first's.

        Raises:
            ValueError: if a token is not in the vocabulary.
        """
        said = {}  # of several at one tick, the last counts
        for tick, token in self._timed(tokens):
            if self.first_tempo <= token < self.first_composer:
                said[tick] = self.tempos[token - self.first_tempo]
        changes: list[Tempo] = []
        for tick, tempo in said.items():
            if not changes or changes[-1].beats_per_minute != tempo:
                changes.append(Tempo(tick, tempo))
        return changes

    def transpose(self, tokens: Tensor, semitones: int) -> Tensor:
        """The same music in another key; pitches that would leave 0 to 127 stay within their octave of the edge.

        Drums stay as they are.
        """
        is_note = tokens >= self.first_note
        if DRUMS in self.instruments:
            size = len(self.levels) * PITCHES
            is_note &= (tokens - self.first_note) // size != self.instruments.index(DRUMS)
        pitch = (tokens - self.first_note) % PITCHES
        moved = pitch + semitones
        moved = torch.where(moved < 0, moved + 12, torch.where(moved >= PITCHES, moved - 12, moved))
        return torch.where(is_note, tokens - pitch + moved, tokens)

    def without_conditions(self, tokens: Tensor, *, composer: bool, instrumentation: bool) -> Tensor:
        """A piece's tokens less those of its composer, of its instrumentation, or of both."""
        drop = torch.zeros_like(tokens, dtype=torch.bool)
        if composer:
            drop |= (self.first_composer <= tokens) & (tokens < self.first_instrument)
        if instrumentation:
            drop |= (self.first_instrument <= tokens) & (tokens < self.first_note)
        return tokens[~drop]

    def check(self, token: int) -> None:
        """Raise a ValueError if ``token`` is none of the vocabulary's."""
        if not 0 <= token < len(self):
            raise ValueError(f"a token must be from 0 to {len(self) - 1}, got {token}")

    def _timed(self, tokens: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Each token until the end with the tick at which it is; a wait's is when it is over."""
        now = 0
        for token in tokens:
            self.check(token)
            if token == self.end:
                return
            if self.first_wait <= token < self.first_tempo:
                now += token - self.first_wait + 1
            yield now, token

    def _tempo_changes(self, tempos: Iterable[Tempo]) -> list[tuple[int, int]]:
        """The tick and token of each tempo that changes what is heard."""
        levels: dict[int, int] = {}  # of several at one tick, the last counts
        for tempo in sorted(tempos, key=lambda tempo: tempo.start):
            if not (tempo.beats_per_minute > 0 and math.isfinite(tempo.beats_per_minute)) or tempo.start < 0:
                raise ValueError(f"a tempo must be positive, finite and from tick 0 or later, got {tempo}")
            levels[tempo.start] = self.tempo_token(tempo.beats_per_minute)
        changes: list[tuple[int, int]] = []
        for tick, token in levels.items():
            if not changes or changes[-1][1] != token:
                changes.append((tick, token))
        return changes

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

    def _check_note(self, note: Note) -> None:
        if note.instrument not in self.instruments:
            names = ", ".join(self.instruments)
            raise ValueError(f"a note's instrument must be one of {names}, got {note.instrument!r}")
        check_note(note)


#: The four voices of a chorale, at one velocity, which is all that their scores say.
CHORALES = Vocabulary(instruments=("soprano", "alto", "tenor", "bass"))

#: Bands, orchestras and pianos, from MIDI files: the families of General MIDI and drums.
GENERAL = Vocabulary(
    instruments=(
        "piano", "percussion", "organ", "guitar", "bass_guitar", "strings", "brass", "winds", "synth", DRUMS,
    ),
    velocities=(16, 32, 48, 64, 80, 96, 112, 127),
    tempos=tuple(round(30 * 2 ** (step / 8)) for step in range(25)),  # 30 to 240, each 9 % faster than the one before
    instrumentation=True,
)  # fmt: skip
