"""The chorales."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from models.musenet import data
from models.musenet.data import Piece, chorales
from models.musenet.midi import VOICES
from models.musenet.tokens import CHORALES


def test_pieces_have_four_voices_that_sing_one_note_at_a_time(pieces: list[Piece]) -> None:
    assert len(pieces) == len({piece.name for piece in pieces}) == 4
    for piece in pieces:
        for voice in VOICES:
            line = [note for note in piece.notes if note.instrument == voice]
            assert len(line) > 20
            assert all(before.end <= after.start for before, after in pairwise(line))


def test_notes_are_those_that_music21_counts(pieces: list[Piece]) -> None:
    from music21 import corpus

    score = corpus.parse(f"bach/{pieces[0].name}")
    bass = next(part for part in score.parts if part.partName == "Bass").stripTies().flatten().notes
    ours = [(note.start / 24, note.duration / 24, note.pitch) for note in pieces[0].notes if note.instrument == "bass"]
    assert ours == [(float(n.offset), float(n.quarterLength), n.pitch.midi) for n in bass]


def test_tokens_say_all_that_the_notes_say(pieces: list[Piece]) -> None:
    for piece in pieces:
        assert CHORALES.decode(CHORALES.encode(piece.notes)) == list(piece.notes)


def test_a_smaller_number_is_the_same_pieces_on_the_same_side(pieces: list[Piece]) -> None:
    assert chorales(2) == pieces[:2]
    assert [piece.held_out for piece in pieces] == [True, False, False, False]


def test_the_cache_is_read_and_mended(pieces: list[Piece], monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    parse = data._parse
    monkeypatch.setattr(data, "_parse", lambda source: parsed.append(source.stem) or parse(source))
    assert chorales(4) == pieces
    assert not parsed
    (damaged,) = data.cache_directory().rglob(f"{pieces[1].name}.json")
    damaged.write_text(damaged.read_text()[:-20])
    assert chorales(4) == pieces
    assert parsed == [pieces[1].name]


def test_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="limit"):
        chorales(0)


def test_the_cache_is_where_it_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDL_KERNELS_CACHE", str(tmp_path))
    assert data.cache_directory() == tmp_path
    monkeypatch.delenv("GDL_KERNELS_CACHE")
    assert data.cache_directory() == Path(data.__file__).parents[2] / ".cache"
