"""MIDI files to notes and back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import replacing
from .tokens import DRUMS, TICKS_PER_BEAT, Note, Tempo, check_note

VOICES = ("soprano", "alto", "tenor", "bass")

#: General MIDI's families of eight programs each, as the few instruments that a vocabulary needs.
FAMILIES = (
    "piano", "percussion", "organ", "guitar", "bass_guitar", "strings", "strings", "brass",
    "winds", "winds", "synth", "synth", "synth", "strings", "percussion", "synth",
)  # fmt: skip

#: The General MIDI program that plays an instrument.
PROGRAMS = {
    **dict.fromkeys(VOICES, 52), "piano": 0, "percussion": 11, "organ": 19, "guitar": 24, "bass_guitar": 33,
    "strings": 48, "brass": 61, "winds": 73, "synth": 81, DRUMS: 0,
}  # fmt: skip

#: Quarter notes a minute. MIDI keeps microseconds a quarter note in 24 bits, which ends at 3.6 a minute.
SLOWEST, FASTEST = 4, 1000


#: The tempo of a file that says none.
USUAL = 120


@dataclass(frozen=True)
class Music:
    """Notes in order of time, and the tempos, the first from tick 0 on."""

    notes: list[Note]
    tempos: list[Tempo]


def read_midi(path: Path, instruments: Collection[str] = (*VOICES, *FAMILIES, DRUMS)) -> Music:
    """The music of a MIDI file, rounded to the grid of ``TICKS_PER_BEAT``.

    A track that bears the name of a voice in ``instruments`` is that voice (soprano, alto, tenor, bass); others go by
    their program's family.

    Args:
        instruments: a vocabulary's, for what "Bass" names: a singer where it has one, else what the program says.

    Raises:
        ValueError: if the file is missing, is not MIDI, is cut off, or has no notes. The message names it and says why.
    """
    import symusic

    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    if not content:
        raise ValueError(f"{path}: the file is empty")
    try:
        score: Any = symusic.Score.from_midi(content)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole MIDI file ({error})") from error
    # The reader takes the tracks that it finds, so a file cut off between two of them would read as music.
    told, found = int.from_bytes(content[10:12], "big"), _whole_tracks(content)
    if found < told:
        raise ValueError(f"{path}: cut off: {found} of its {told} tracks are there")
    if score.ticks_per_quarter <= 0:
        raise ValueError(f"{path}: its {score.ticks_per_quarter} ticks a quarter note are no tempo to read it by")
    grid = TICKS_PER_BEAT / score.ticks_per_quarter
    voices = set(VOICES) & set(instruments)
    notes = []
    for track in score.tracks:
        instrument = _instrument(track.name, track.program, track.is_drum, voices)
        for note in track.notes:
            start, end = round(note.start * grid), round(note.end * grid)
            notes.append(Note(start, max(end - start, 1), instrument, note.pitch, note.velocity))
    if not notes:
        raise ValueError(f"{path}: a MIDI file without a single note")
    tempos = {0: float(USUAL)}
    for tempo in sorted(score.tempos, key=lambda tempo: tempo.time):
        if tempo.mspq > 0:  # some files have beats of no length, at which nothing can be played
            tempos[round(tempo.time * grid)] = tempo.qpm  # of several at one tick, the last counts
    return Music(sorted(notes), [Tempo(start, pace) for start, pace in tempos.items()])


def write_midi(
    notes: Sequence[Note], path: Path, *, beats_per_minute: float = 80.0, tempos: Sequence[Tempo] = ()
) -> None:
    """Write notes as a MIDI file with a track an instrument.

    Args:
        beats_per_minute: the tempo until the first of ``tempos``.

    Raises:
        ValueError: if there are no notes, a note is one that MIDI can't say, or a tempo is not from 4 to 1000.
    """
    import symusic

    if not notes:
        raise ValueError(f"notes for {path} must be at least one, got none")
    for note in notes:
        check_note(note)
    if not SLOWEST <= beats_per_minute <= FASTEST:
        raise ValueError(f"beats_per_minute must be from {SLOWEST} to {FASTEST}, got {beats_per_minute}")
    paces = {0: beats_per_minute}
    for tempo in tempos:
        if not (SLOWEST <= tempo.beats_per_minute <= FASTEST and tempo.start >= 0):
            raise ValueError(f"tempos must be from {SLOWEST} to {FASTEST}, from tick 0 or later, got {tempo}")
        paces[tempo.start] = tempo.beats_per_minute
    score: Any = symusic.Score(TICKS_PER_BEAT)
    for start in sorted(paces):
        score.tempos.append(symusic.Tempo(start, qpm=paces[start]))
    for instrument in sorted({note.instrument for note in notes}, key=_score_order):
        drums = instrument == DRUMS
        track: Any = symusic.Track(name=instrument, program=PROGRAMS.get(instrument, 0), is_drum=drums)
        for note in notes:
            if note.instrument == instrument:
                track.notes.append(symusic.Note(note.start, note.duration, note.pitch, note.velocity))
        score.tracks.append(track)
    with replacing(path) as temporary:
        temporary.write_bytes(score.dumps_midi())


def _whole_tracks(content: bytes) -> int:
    """How many track chunks a MIDI file has from beginning to end. A chunk: a name of 4 bytes, its length in 4, it."""
    found = place = 0
    while place + 8 <= len(content):
        end = place + 8 + int.from_bytes(content[place + 4 : place + 8], "big")
        found += content[place : place + 4] == b"MTrk" and end <= len(content)
        place = end
    return found


def _instrument(name: str, program: int, is_drum: bool, voices: Collection[str]) -> str:
    if is_drum:
        return DRUMS
    if name.strip().lower() in voices:
        return name.strip().lower()
    return FAMILIES[program // 8]


def _score_order(instrument: str) -> tuple[int, str]:
    """Voices from the top down, then the rest by name."""
    return (VOICES.index(instrument) if instrument in VOICES else len(VOICES)), instrument
