"""Notes to tokens and back."""

from __future__ import annotations

import itertools
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.musenet.tokens import CHORALES, DRUMS, GENERAL, PITCHES, Note, Tempo, Vocabulary, pitch_name

ENSEMBLE = Vocabulary(
    ("piano", "strings", "drums"), velocities=(20, 60, 100), longest_wait=7, tempos=(40, 60, 90),
    composers=("bach", "satie"), instrumentation=True,
)  # fmt: skip


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


@given(
    separate_notes(),
    st.lists(st.builds(Tempo, st.integers(0, 60), st.floats(1, 1000)), max_size=6),
    st.sampled_from([None, *ENSEMBLE.composers]),
)
def test_tempos_and_conditions_leave_the_notes_as_they_are(
    notes: list[Note], tempos: list[Tempo], composer: str | None
) -> None:
    tokens = ENSEMBLE.encode(notes, tempos=tempos, composer=composer)
    assert ENSEMBLE.decode(tokens) == notes
    # The level that holds at a tick is that of the last tempo until then.
    over = max((note.end for note in notes), default=0)
    said = ENSEMBLE.decode_tempos(tokens)
    for tick in range(over):
        given = [tempo for tempo in sorted(tempos, key=lambda tempo: tempo.start) if tempo.start <= tick]
        heard = [tempo.beats_per_minute for tempo in said if tempo.start <= tick]
        if not given:
            assert not heard
        else:
            ratio = {level: max(level / given[-1].beats_per_minute, given[-1].beats_per_minute / level)
                     for level in ENSEMBLE.tempos}  # fmt: skip
            assert ratio[int(heard[-1])] == min(ratio.values())
    assert all(before.beats_per_minute != after.beats_per_minute for before, after in pairwise(said))
    assert ENSEMBLE.encode(notes, tempos=said, composer=composer) == tokens


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
    notes, tempos = ENSEMBLE.decode(tokens), ENSEMBLE.decode_tempos(tokens)
    again = ENSEMBLE.encode(notes, tempos=tempos)
    assert ENSEMBLE.decode(again) == notes
    over = max((note.end for note in notes), default=0)
    assert ENSEMBLE.decode_tempos(again) == [tempo for tempo in tempos if tempo.start < over]


def test_a_bar_reads_as_musenet_writes_it() -> None:
    notes = [Note(0, 24, "soprano", 72), Note(0, 48, "bass", 48), Note(24, 24, "soprano", 74)]
    names = [CHORALES.name(token) for token in CHORALES.encode(notes)]
    assert names == [
        "start", "soprano:v80:C5", "bass:v80:C3", "wait:24", "soprano:v0:C5", "soprano:v80:D5", "wait:24",
        "soprano:v0:D5", "bass:v0:C3", "end",
    ]  # fmt: skip


def test_a_piece_of_an_ensemble_begins_with_what_it_is() -> None:
    notes = [Note(0, 6, "strings", 60, 60), Note(3, 9, "piano", 48, 100)]
    tempos = [Tempo(0, 61), Tempo(3, 59), Tempo(6, 100), Tempo(12, 40)]
    names = [ENSEMBLE.name(token) for token in ENSEMBLE.encode(notes, tempos=tempos, composer="satie")]
    assert names == [
        "start", "by:satie", "with:piano", "with:strings", "tempo:60", "strings:v60:C4", "wait:3", "piano:v100:C3",
        "wait:3", "tempo:90", "strings:v0:C4", "wait:6", "piano:v0:C3", "end",
    ]  # fmt: skip


def test_every_token_has_a_name_of_its_own() -> None:
    names = [ENSEMBLE.name(token) for token in range(len(ENSEMBLE))]
    assert len(set(names)) == len(ENSEMBLE) == 2 + 7 + 3 + 2 + 3 + 3 * 4 * 128
    assert len(CHORALES) == 2 + 96 + 4 * 2 * 128
    assert len(GENERAL) == 2 + 96 + 25 + 10 + 10 * 9 * 128


def test_conditions_can_be_left_out() -> None:
    tokens = torch.tensor(ENSEMBLE.encode([Note(0, 6, "drums", 36)], tempos=[Tempo(0, 60)], composer="bach"))
    names = {}
    for composer, instrumentation in itertools.product((False, True), repeat=2):
        left = ENSEMBLE.without_conditions(tokens, composer=composer, instrumentation=instrumentation)
        names[composer, instrumentation] = [ENSEMBLE.name(token) for token in left.tolist()]
    assert names[False, False][1:4] == ["by:bach", "with:drums", "tempo:60"]
    assert names[True, False][1:3] == ["with:drums", "tempo:60"]
    assert names[False, True][1:3] == ["by:bach", "tempo:60"]
    assert names[True, True][1] == "tempo:60"
    assert {len(left) for left in names.values()} == {len(tokens), len(tokens) - 1, len(tokens) - 2}


def test_conditions_that_no_token_says_are_refused() -> None:
    assert ENSEMBLE.conditions(composer="bach", instruments=["drums"]) == [12, 16]
    with pytest.raises(ValueError, match="composer must be one of bach, satie; got 'liszt'"):
        ENSEMBLE.encode([], composer="liszt")
    with pytest.raises(ValueError, match="none, for this vocabulary has no composers; got 'liszt'"):
        CHORALES.conditions(composer="liszt")
    with pytest.raises(ValueError, match="instruments must be of piano, strings, drums, got 'kazoo'"):
        ENSEMBLE.conditions(instruments=["piano", "kazoo"])
    with pytest.raises(ValueError, match="no tokens of instrumentation"):
        CHORALES.conditions(instruments=["bass"])


@pytest.mark.parametrize("tempo", [Tempo(0, 0), Tempo(0, float("nan")), Tempo(0, float("inf")), Tempo(-1, 60)])
def test_a_tempo_that_makes_no_sense_is_refused(tempo: Tempo) -> None:
    with pytest.raises(ValueError, match="a tempo must be positive"):
        ENSEMBLE.encode([], tempos=[tempo])


def test_velocities_go_to_the_nearest() -> None:
    (note,) = ENSEMBLE.decode(ENSEMBLE.encode([Note(0, 3, "piano", 60, 85)]))
    assert note.velocity == 100


@given(separate_notes(), st.integers(-5, 6))
def test_transposing_tokens_transposes_notes(notes: list[Note], semitones: int) -> None:
    inner = [note for note in notes if 12 <= note.pitch < PITCHES - 12]
    moved = ENSEMBLE.transpose(torch.tensor(ENSEMBLE.encode(inner)), semitones)
    expected = [
        Note(n.start, n.duration, n.instrument, n.pitch + semitones * (n.instrument != DRUMS), n.velocity)
        for n in inner
    ]
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
    "fields",
    [
        {"instruments": ()}, {"velocities": (80, 20)}, {"velocities": (0,)}, {"longest_wait": 0}, {"tempos": (60, 60)},
        {"tempos": (0,)}, {"composers": ("bach", "bach")},
    ],
)  # fmt: skip
def test_a_vocabulary_that_makes_no_sense_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Vocabulary(**{"instruments": ("piano",), **fields})


def test_pitch_names() -> None:
    assert [pitch_name(pitch) for pitch in (21, 60, 61, 108)] == ["A0", "C4", "C#4", "C8"]
