"""What a model learns from, and is measured on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.musenet.data import Piece, encoded, stream
from models.musenet.excerpts import KEYS, Excerpts, held_out, windows
from models.musenet.places import UNKNOWN, Places, of_piece
from models.musenet.tokens import CHORALES, Note, Vocabulary

BAND = Vocabulary(("piano", "drums"), tempos=(60, 120), composers=("bach", "satie"), instrumentation=True)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def chorales(pieces: list[Piece]) -> list[Tensor]:
    return [encoded(piece, CHORALES) for piece in pieces]


def test_excerpts_go_on_from_a_saved_state(chorales: list[Tensor]) -> None:
    generator = seeded(3)
    drawn = iter(Excerpts(chorales, CHORALES, 100, 2, generator, drop=0.5))
    next(drawn)
    state = generator.get_state()
    expected = next(drawn)
    assert expected.tokens.shape == (2, 101)
    assert all(place.shape == (2, 101) for place in expected.places)
    restored = torch.Generator()
    restored.set_state(state)
    again = next(iter(Excerpts(chorales, CHORALES, 100, 2, restored, drop=0.5)))
    assert torch.equal(again.tokens, expected.tokens)
    assert all(map(torch.equal, again.places, expected.places))


def test_excerpts_are_music_in_every_key(chorales: list[Tensor]) -> None:
    source = chorales[0].long()
    keys = {tuple(CHORALES.transpose(source, key)[:20].tolist()) for key in KEYS}
    drawn = iter(Excerpts(chorales[:1], CHORALES, 3 * len(source), 1, seeded(0)))
    seen = set()
    for _ in range(30):
        (excerpt,) = next(drawn).tokens.tolist()
        starts = [place for place, token in enumerate(excerpt[:-20]) if token == CHORALES.start]
        seen |= {tuple(excerpt[place : place + 20]) for place in starts}
    assert seen == keys
    assert len(keys) == 12


def test_tokens_of_an_excerpt_know_their_place_in_their_piece(chorales: list[Tensor]) -> None:
    places_of = {tuple(tokens.tolist()): of_piece(CHORALES, tokens.long(), length=len(tokens)) for tokens in chorales}
    drawn = iter(Excerpts(chorales, CHORALES, 600, 1, seeded(1), transpose=False))
    met = set()
    for _ in range(40):
        excerpt = next(drawn)
        tokens, places = excerpt.tokens[0], Places(*(place[0] for place in excerpt.places))
        edges = [0, *(i for i, token in enumerate(tokens.tolist()) if i and token == CHORALES.start), len(tokens)]
        for begin, end in pairwise(edges):
            part = tokens[begin:end].tolist()
            fitting = [
                (at, whole) for whole in places_of for at in range(len(whole) - len(part) + 1)
                if whole[at : at + len(part)] == tuple(part)
            ]  # fmt: skip
            assert any(
                all(map(torch.equal, places.span(begin, end), places_of[whole].span(at, at + len(part))))
                for at, whole in fitting
            )
            met.add((begin == 0 and part[0] == CHORALES.start, part[-1] == CHORALES.end))
    assert met == {(first, last) for first in (False, True) for last in (False, True)}  # cut on every side


def test_what_is_dropped_is_as_often_missing_as_was_asked() -> None:
    piece = Piece("a", (Note(0, 24, "piano", 60), Note(24, 24, "drums", 36)), held_out=False, composer="bach")
    tokens = encoded(piece, BAND)
    by, plays = BAND.conditions(composer="bach"), BAND.conditions(instruments=["piano", "drums"])
    for drop in (0.0, 0.3, 1.0):
        counts = torch.zeros(3)
        total = 0
        drawn = iter(Excerpts([tokens], BAND, 400, 1, seeded(0), drop=drop))
        for _ in range(8):
            excerpt = next(drawn)
            row, places = excerpt.tokens[0].tolist(), excerpt.places.part[0].tolist()
            starts = [i for i, token in enumerate(row) if token == BAND.start and BAND.end in row[i:]]
            for i in starts:
                whole = row[i : row.index(BAND.end, i)]
                counts += torch.tensor([by[0] not in whole, plays[0] not in whole, places[i] == UNKNOWN])
                total += 1
                assert (plays[0] in whole) == (plays[1] in whole)
        # Four standard deviations of a share.
        torch.testing.assert_close(
            counts / total, torch.full((3,), drop), rtol=0, atol=4 * (drop * (1 - drop) / total) ** 0.5
        )
        assert total > 200


def test_a_short_piece_is_often_met_from_its_start_and_a_long_one_anywhere(chorales: list[Tensor]) -> None:
    for length, share in ((len(chorales[0]), 0.5), (20, 20 / (len(chorales[0]) + 20))):
        drawn = iter(Excerpts(chorales[:1], CHORALES, length, 300, seeded(0)))
        begun = (next(drawn).tokens[:, 0] == CHORALES.start).float().mean().item()
        assert begun == pytest.approx(
            share + (1 - share) / len(chorales[0]), abs=4 * (share * (1 - share) / 300) ** 0.5
        )


def test_chunks_are_the_whole() -> None:
    excerpt = held_out([torch.arange(2, 72)], CHORALES, 10, 5)
    chunks = list(excerpt.chunks(2))
    assert [len(chunk.tokens) for chunk in chunks] == [2, 2, 1]
    assert torch.equal(torch.cat([chunk.tokens for chunk in chunks]), excerpt.tokens)
    for name, place in excerpt.places._asdict().items():
        assert torch.equal(torch.cat([getattr(chunk.places, name) for chunk in chunks]), place)


def test_held_out_excerpts_follow_each_other_and_do_not_tell_their_length(
    pieces: list[Piece], chorales: list[Tensor]
) -> None:
    excerpt = held_out(chorales[:2], CHORALES, 100, 7)
    whole = stream(pieces[:2], CHORALES)
    for place, row in enumerate(excerpt.tokens):
        assert torch.equal(row, whole[100 * place : 100 * place + 101])
    assert (excerpt.places.part == UNKNOWN).all()
    assert (excerpt.places.countdown == UNKNOWN).all()
    second = len(chorales[0])
    assert excerpt.places.elapsed.flatten().max() > 30
    assert excerpt.places.elapsed[second // 100, second % 100] == 0
    assert torch.equal(held_out(chorales[:2], CHORALES, 10**5, 7).tokens, whole[None])


def test_windows_follow_each_other() -> None:
    tokens = torch.arange(24)
    assert windows(tokens, 10, 5).tolist() == [list(range(11)), list(range(10, 21))]
    assert windows(tokens, 10, 1).tolist() == [list(range(11))]


def test_there_must_be_a_piece() -> None:
    with pytest.raises(ValueError, match="pieces must be at least one"):
        Excerpts([], CHORALES, 10, 1, seeded(0))
