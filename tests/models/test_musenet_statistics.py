"""Counting music."""

from __future__ import annotations

import math
import random
from dataclasses import astuple

import pytest

from models.musenet.data import Piece
from models.musenet.statistics import Key, Statistics, has_pitch, key, mean, measure
from models.musenet.tokens import Note

SCALE = (60, 62, 64, 65, 67, 69, 71, 72)


def line(pitches: tuple[int, ...], length: int = 24) -> list[Note]:
    return [Note(place * length, length, "piano", pitch) for place, pitch in enumerate(pitches)]


def test_keys_are_those_that_music21_finds(pieces: list[Piece]) -> None:
    from music21 import analysis, note, stream

    for piece in pieces:
        score = stream.Stream()
        for sung in piece.notes:
            score.insert(sung.start / 24, note.Note(sung.pitch, quarterLength=sung.duration / 24))
        peer = analysis.discrete.KrumhanslKessler(score).getSolution(score)
        found = key(piece.notes)
        assert (found.tonic, found.mode) == (peer.tonic.pitchClass, peer.mode), piece.name


@pytest.mark.parametrize("semitones", range(12))
def test_the_key_moves_with_the_notes(pieces: list[Piece], semitones: int) -> None:
    notes = pieces[0].notes
    moved = [Note(n.start, n.duration, n.instrument, n.pitch + semitones) for n in notes]
    before, after = key(notes), key(moved)
    assert (after.tonic, after.mode) == ((before.tonic + semitones) % 12, before.mode)
    assert astuple(measure(moved)) == pytest.approx(astuple(measure(notes)))


def test_a_scale_is_counted_as_defined() -> None:
    statistics = measure([*line(SCALE), Note(192, 48, "piano", 61), Note(0, 400, "drums", 61)])
    assert key(line(SCALE)).name == "C major"
    assert statistics.in_key == pytest.approx(8 / 9)  # drums have no pitch
    assert statistics.length == pytest.approx((8 * 1 + 2) / 9)
    assert statistics.length_entropy == pytest.approx(8 / 9 * math.log2(9 / 8) + 1 / 9 * math.log2(9))
    assert statistics.pitch_class_entropy == pytest.approx(7 / 9 * math.log2(9) + 2 / 9 * math.log2(9 / 2))


def test_minor_has_its_leading_tone() -> None:
    assert Key(9, "minor").scale == {9, 11, 0, 2, 4, 5, 7, 8}
    assert Key(9, "minor").name == "A minor"
    assert Key(10, "major").scale == {10, 0, 2, 3, 5, 7, 9}


def test_chorales_are_more_in_key_than_random_notes(pieces: list[Piece]) -> None:
    bach = mean([measure(piece.notes) for piece in pieces])
    draw = random.Random(0)
    noise = measure([Note(24 * place, 24, "piano", draw.randrange(48, 84)) for place in range(400)])
    assert bach.in_key > 0.9
    assert noise.in_key < 0.75
    assert bach.pitch_class_entropy < noise.pitch_class_entropy


def test_a_corpus_is_the_mean_of_its_pieces() -> None:
    assert mean([Statistics(0.5, 1, 2, 3), Statistics(1.0, 2, 4, 0)]) == Statistics(0.75, 1.5, 3, 1.5)
    with pytest.raises(ValueError, match="pieces must be at least one"):
        mean([])


def test_drums_alone_have_no_key() -> None:
    drums = [Note(0, 24, "drums", 36)]
    assert not has_pitch(drums)
    assert has_pitch([*drums, Note(0, 24, "bass", 36)])
    for function in (key, measure):
        with pytest.raises(ValueError, match="at least one that has a pitch"):
            function(drums)
