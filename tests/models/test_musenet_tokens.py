"""Notes to tokens and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.musenet.tokens import CHORALES, PITCHES, Note, Vocabulary, pitch_name

ENSEMBLE = Vocabulary(("piano", "strings", "drums"), velocities=(20, 60, 100), longest_wait=7)


@st.composite
def separate_notes(draw: st.DrawFn) -> list[Note]:
    """Notes of which an instrument never sounds the same pitch twice at a time."""
    notes = []
    line = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30), st.sampled_from(ENSEMBLE.velocities)), max_size=5)
    keys = st.tuples(st.sampled_from(ENSEMBLE.instruments), st.integers(0, PITCHES - 1))
    for instrument, pitch in draw(st.sets(keys, max_size=6)):
        now = 0
        for gap, duration, velocity in draw(line):
            notes.append(Note(now + gap, duration, instrument, pitch, velocity))
            now += gap + duration
    return sorted(notes)


any_note = st.builds(
    Note,
    start=st.integers(0, 40),
    duration=st.integers(1, 40),
    instrument=st.sampled_from(ENSEMBLE.instruments),
    pitch=st.integers(58, 62),
    velocity=st.integers(1, 127),
)


@given(separate_notes())
def test_decoding_undoes_encoding(notes: list[Note]) -> None:
    assert ENSEMBLE.decode(ENSEMBLE.encode(notes)) == notes


@given(st.lists(any_note, max_size=30))
def test_overlapping_notes_keep_every_onset(notes: list[Note]) -> None:
    decoded = ENSEMBLE.decode(ENSEMBLE.encode(notes))
    onset = {(note.instrument, note.pitch, note.start) for note in notes}
    assert {(note.instrument, note.pitch, note.start) for note in decoded} == onset
    for note in decoded:
        same = [n for n in decoded if (n.instrument, n.pitch) == (note.instrument, note.pitch) and n != note]
        assert all(other.end <= note.start or note.end <= other.start for other in same)
    assert ENSEMBLE.decode(ENSEMBLE.encode(decoded)) == decoded


@given(st.lists(st.integers(0, len(ENSEMBLE) - 1), max_size=60))
def test_any_tokens_decode_to_notes_that_encode(tokens: list[int]) -> None:
    notes = ENSEMBLE.decode(tokens)
    assert ENSEMBLE.decode(ENSEMBLE.encode(notes)) == notes


def test_a_bar_reads_as_musenet_writes_it() -> None:
    notes = [Note(0, 24, "soprano", 72), Note(0, 48, "bass", 48), Note(24, 24, "soprano", 74)]
    names = [CHORALES.name(token) for token in CHORALES.encode(notes)]
    assert names == [
        "start", "soprano:v80:C5", "bass:v80:C3", "wait:24", "soprano:v0:C5", "soprano:v80:D5", "wait:24",
        "soprano:v0:D5", "bass:v0:C3", "end",
    ]  # fmt: skip


def test_every_token_has_a_name_of_its_own() -> None:
    names = [ENSEMBLE.name(token) for token in range(len(ENSEMBLE))]
    assert len(set(names)) == len(ENSEMBLE) == 2 + 7 + 3 * 4 * 128


def test_velocities_go_to_the_nearest() -> None:
    (note,) = ENSEMBLE.decode(ENSEMBLE.encode([Note(0, 3, "piano", 60, 85)]))
    assert note.velocity == 100


@given(separate_notes(), st.integers(-5, 6))
def test_transposing_tokens_transposes_notes(notes: list[Note], semitones: int) -> None:
    inner = [note for note in notes if 12 <= note.pitch < PITCHES - 12]
    moved = ENSEMBLE.transpose(torch.tensor(ENSEMBLE.encode(inner)), semitones)
    expected = [Note(n.start, n.duration, n.instrument, n.pitch + semitones, n.velocity) for n in inner]
    assert ENSEMBLE.decode(moved.tolist()) == sorted(expected)


def test_transposing_stays_in_range() -> None:
    tokens = torch.arange(len(ENSEMBLE))
    for semitones in (-5, 6):
        moved = ENSEMBLE.transpose(tokens, semitones)
        assert torch.equal(moved[: ENSEMBLE.first_note], tokens[: ENSEMBLE.first_note])
        for before, after in zip(tokens[ENSEMBLE.first_note :].tolist(), moved[ENSEMBLE.first_note :].tolist()):
            assert ENSEMBLE.event(before)[:2] == ENSEMBLE.event(after)[:2]


@pytest.mark.parametrize(
    ("note", "what"),
    [
        (Note(0, 1, "kazoo", 60), "kazoo"),
        (Note(0, 1, "piano", 128), "pitch"),
        (Note(0, 1, "piano", 60, 0), "velocity"),
        (Note(-1, 1, "piano", 60), "start"),
        (Note(0, 0, "piano", 60), "last"),
    ],
)
def test_a_note_that_no_token_says_is_refused(note: Note, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        ENSEMBLE.encode([note])


@pytest.mark.parametrize("token", [-1, len(ENSEMBLE)])
def test_a_token_out_of_range_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match=f"got {token}"):
        ENSEMBLE.decode([token])


@pytest.mark.parametrize(
    "fields", [{"instruments": ()}, {"velocities": (80, 20)}, {"velocities": (0,)}, {"longest_wait": 0}]
)
def test_a_vocabulary_that_makes_no_sense_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Vocabulary(**{"instruments": ("piano",), **fields})


def test_pitch_names() -> None:
    assert [pitch_name(pitch) for pitch in (21, 60, 61, 108)] == ["A0", "C4", "C#4", "C8"]
