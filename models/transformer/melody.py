"""A MIDI file's melody, for a model to harmonise."""

from __future__ import annotations

from pathlib import Path

from ..musenet.midi import read_midi
from ..musenet.tokens import Note, pitch_name
from .harmony import MELODY_PITCHES, REST, encode

#: Whose track is the melody.
VOICE = "soprano"


def read_melody(path: Path) -> tuple[list[Note], list[int]]:
    """The notes of a file's melody and its tokens, as :func:`~.harmony.encode` gives them.

    The melody is the track named soprano; if there is none, the highest that sounds of all that is not drums.

    Raises:
        ValueError: naming the file, if it can't be read, has no melody, or one that no model has learnt from.
    """
    notes = read_midi(path).notes
    line = [note for note in notes if note.instrument == VOICE] or _highest(notes)
    if not line:
        raise ValueError(f"{path}: must have a melody, but has only drums")
    for note in line:
        if note.pitch not in MELODY_PITCHES:
            low, high = pitch_name(MELODY_PITCHES[0]), pitch_name(MELODY_PITCHES[-1])
            raise ValueError(f"{path}: its melody must be from {low} to {high}, but has a {pitch_name(note.pitch)}")
    tokens = encode(line)
    if all(token == REST for token in tokens):
        raise ValueError(f"{path}: its melody must sound when an eighth note begins, but every note lies between two")
    return line, tokens


def _highest(notes: list[Note]) -> list[Note]:
    """Those notes during which no higher one sounds; one ends where a higher one begins, and does not come back."""
    line: list[Note] = []
    for note in sorted((n for n in notes if n.instrument != "drums"), key=lambda n: (n.start, -n.pitch)):
        if line and note.start < line[-1].end:
            if note.pitch <= line[-1].pitch:
                continue
            last = line.pop()
            if last.start < note.start:
                line.append(Note(last.start, note.start - last.start, VOICE, last.pitch, last.velocity))
        line.append(Note(note.start, note.duration, VOICE, note.pitch, note.velocity))
    return line
